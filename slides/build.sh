#!/usr/bin/env bash
# Build all decks in English and Korean into build/slides/: Markdown -> one HTML file that opens offline, and a PDF.
#   bash slides/build.sh              or: make slides
#   ONLY="seminar.ko" bash slides/build.sh     some of them
#   FIGURES=1 bash slides/build.sh    draws the figures again first (some minutes on 2 cores)
set -euo pipefail
cd "$(dirname "$0")/.."
out=build/slides

stop() { echo "slides: $1" >&2; exit 1; }

command -v node >/dev/null 2>&1 && command -v npm >/dev/null 2>&1 ||
  stop "Node.js 18 or newer is needed to build the slides (https://nodejs.org)."
node -e 'process.exit(parseInt(process.versions.node) < 18 ? 1 : 0)' ||
  stop "Node.js 18 or newer is needed, and this is $(node --version)."
py=.venv/bin/python
[ -x $py ] || py=.venv/Scripts/python.exe
[ -x $py ] || stop "the course's Python is needed; run \`make install\` first."
export PYTHONPATH="$PWD"

# The stamp is written last, so an interrupted install is taken up again.
if ! cmp -s slides/package-lock.json slides/node_modules/.installed; then
  echo "slides: installing Marp (once, about 140 MB)"
  (cd slides && npm ci --no-audit --no-fund --loglevel=error) || stop "npm ci failed: is there a network?"
  cp slides/package-lock.json slides/node_modules/.installed
fi
[ "${FIGURES:-}" != 1 ] || $py slides/board.py || stop "slides/board.py did not finish (see above)."

browser="${CHROME_PATH:-}"
for name in chromium chromium-browser google-chrome google-chrome-stable microsoft-edge msedge \
  "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome" \
  "/Applications/Chromium.app/Contents/MacOS/Chromium" \
  "/Applications/Microsoft Edge.app/Contents/MacOS/Microsoft Edge" \
  "/c/Program Files/Google/Chrome/Application/chrome.exe" \
  "/c/Program Files (x86)/Microsoft/Edge/Application/msedge.exe"; do
  [ -n "$browser" ] || browser="$(command -v "$name" 2>/dev/null || true)"
done
[ -n "$browser" ] || echo "slides: no Chrome, Chromium or Edge was found, so the PDFs are skipped (CHROME_PATH names one)."
# Inside a container or as root the browser's sandbox does not start; the decks are our own files.
if [ "$(uname -s)" = Linux ]; then export CHROME_NO_SANDBOX=1; fi

marp() { node slides/node_modules/@marp-team/marp-cli/marp-cli.js --no-config-file --theme "$out/theme.css" --html "$@"; }
rm -f "$out"/*.md  # of decks that are no longer there
$py slides/deck.py "$out" >/dev/null
$py slides/fonts.py "$out/theme.css" "$out"/*.md
for deck in "$out"/*.md; do
  name="$(basename "${deck%.md}")"
  case " ${ONLY:-$name} " in *" $name "*) ;; *) continue ;; esac
  marp "$deck" --template bespoke -o "$out/$name.html" 2>&1 | grep -v "INFO" || true
  [ -s "$out/$name.html" ] || stop "Marp made no HTML of $name."
  if [ -n "$browser" ]; then
    CHROME_PATH="$browser" marp "$deck" --pdf --pdf-notes --allow-local-files -o "$out/$name.pdf" 2>&1 |
      grep -v "INFO\|Insecure local file\|^ *build" || true
    [ -s "$out/$name.pdf" ] || stop "the browser made no PDF of $name."
    marp "$deck" --template bare --allow-local-files -o "$out/$name.bare.html" 2>&1 | grep -v "INFO" || true
    CHROME_PATH="$browser" node slides/check.mjs "$out/$name.bare.html" || stop "$name: see above."
    rm "$out/$name.bare.html"
  fi
  $py slides/pack.py "$deck"
done
