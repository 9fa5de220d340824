// Look at every slide of a built deck in a browser: nothing leaves the slide or lies on the footer, no figure is tiny,
// no words are smaller than 18 pixels of a slide 1280 wide. Beside each deck a contact sheet of its slides is left.
//   CHROME_PATH=/usr/bin/chromium node slides/check.mjs build/slides/seminar.en.bare.html ...
import path from 'node:path';
import { pathToFileURL } from 'node:url';
import puppeteer from 'puppeteer-core';

const browser = await puppeteer.launch({
  executablePath: process.env.CHROME_PATH,
  args: process.env.CHROME_NO_SANDBOX ? ['--no-sandbox'] : [],
});
let wrong = 0;
for (const file of process.argv.slice(2)) {
  const page = await browser.newPage();
  await page.setViewport({ width: 1280, height: 720 });
  await page.goto(pathToFileURL(path.resolve(file)).href, { waitUntil: 'load' });
  await page.evaluate(() => document.fonts.ready.then(() => undefined));
  const found = await page.evaluate(() => {
    const problems = [];
    document.querySelectorAll('section').forEach((slide, index) => {
      const frame = slide.getBoundingClientRect();
      const scale = frame.width / 1280;
      const say = (words) => problems.push(`slide ${index + 1}, "${slide.querySelector('h1')?.textContent}": ${words}`);
      for (const part of slide.children) {
        if (part.matches('footer, header, p.source, script, style')) continue;
        const box = part.getBoundingClientRect();
        const low = (box.bottom - frame.top) / scale;
        const right = (box.right - frame.left) / scale;
        if (low > 684) say(`<${part.tagName.toLowerCase()}> ends at ${low.toFixed(0)} of 720 pixels`);
        if (right > 1270) say(`<${part.tagName.toLowerCase()}> ends at ${right.toFixed(0)} of 1280 pixels`);
        if (part.scrollWidth > part.clientWidth + 2 && part.clientWidth) say(`<${part.tagName.toLowerCase()}> is too wide`);
      }
      const [links, footer] = ['p.source', 'footer'].map((name) => {
        const words = document.createRange();
        if (!slide.querySelector(name)) return null;
        words.selectNodeContents(slide.querySelector(name));
        return words.getBoundingClientRect();
      });
      if (links && footer && links.left < footer.right + 8 * scale) say('the links lie on the footer');
      for (const image of slide.querySelectorAll('img')) {
        const box = image.getBoundingClientRect();
        const high = box.height / scale;
        // board.py draws 190 dots an inch and small print of 11 points, 29 dots high.
        const print = 29 * Math.min(box.width / image.naturalWidth, box.height / image.naturalHeight) / scale;
        if (!image.complete || !image.naturalWidth) say(`the picture ${image.getAttribute('src').slice(0, 40)} is missing`);
        else if (high < 150) say(`a picture is ${high.toFixed(0)} pixels high`);
        else if (print < 12) say(`the picture is so small that its small print is ${print.toFixed(1)} pixels high`);
      }
      for (const part of slide.querySelectorAll('h1, h2, p:not(.source), li, td, th, pre')) {
        const size = parseFloat(getComputedStyle(part).fontSize);
        if (size < 18) say(`words of ${size} pixels: ${part.textContent.slice(0, 40)}`);
      }
      if (/undefined|\{\{|\}\}/.test(slide.textContent)) say('a template was not filled');
    });
    return problems;
  });
  for (const line of found) console.error(`${path.basename(file)}: ${line}`);
  wrong += found.length;
  // All slides on one picture, five beside each other: five pages of 384 by 216 make a row.
  await page.setViewport({ width: 1952, height: 200 });
  await page.addStyleTag({
    content: `html, body { height: auto !important; overflow: visible !important }
      body { display: grid !important; grid-template-columns: repeat(5, 384px); align-content: start; gap: 6px; padding: 4px; background: #888 }
      body svg[data-marpit-svg] { width: 384px !important; height: 216px !important; margin: 0 !important }`,
  });
  await page.setViewport({ width: 1952, height: await page.evaluate(() => document.body.scrollHeight) });
  await page.screenshot({ path: file.replace(/(\.bare)?\.html$/, '.contact.png') });
  await page.close();
}
await browser.close();
process.exit(wrong ? 1 : 0);
