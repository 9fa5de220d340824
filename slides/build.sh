#!/usr/bin/env bash
# Build every deck in this folder: Markdown -> one HTML file that opens offline, and a PDF.
#   bash slides/build.sh              or: make slides
#   FIGURES=1 bash slides/build.sh    draws the figures again first (needs `make install`; about 3 minutes on 2 cores)
set -euo pipefail
cd "$(dirname "$0")"

stop() { echo "slides: $1" >&2; exit 1; }

command -v node >/dev/null 2>&1 && command -v npm >/dev/null 2>&1 ||
  stop "Node.js 18 or newer is needed to build the slides (https://nodejs.org); the built HTML and PDF are in slides/ already."
node -e 'process.exit(parseInt(process.versions.node) < 18 ? 1 : 0)' ||
  stop "Node.js 18 or newer is needed, and this is $(node --version)."

PY=""
for candidate in ../.venv/bin/python ../.venv/Scripts/python.exe "$(command -v python3 || true)" "$(command -v python || true)"; do
  if [ -n "$candidate" ] && "$candidate" -c "" 2>/dev/null; then PY="$candidate"; break; fi
done
[ -n "$PY" ] || stop "Python 3.10 or newer is needed; run \`make install\` first."

# The stamp is written last, so an interrupted install is taken up again.
if ! cmp -s package-lock.json node_modules/.installed; then
  echo "slides: installing Marp (once, about 140 MB)"
  npm ci --no-audit --no-fund --loglevel=error || stop "npm ci failed: is there a network?"
  cp package-lock.json node_modules/.installed
fi

missing=""
for image in $(grep -oh '](img/[^)]*)' ./*.md | tr -d '()' | sed 's/^]//' | sort -u); do
  [ -f "$image" ] || missing="$missing $(basename "$image" .png)"
done
if [ "${FIGURES:-}" = 1 ]; then
  PYTHONPATH=.. "$PY" figures.py || stop "figures.py did not finish (see above); it needs the course's Python: make install."
elif [ -n "$missing" ]; then
  # shellcheck disable=SC2086
  PYTHONPATH=.. "$PY" figures.py --only $missing || stop "figures.py did not finish (see above); it needs the course's Python: make install."
fi

browser="${CHROME_PATH:-}"
for name in chromium chromium-browser google-chrome google-chrome-stable microsoft-edge msedge \
  "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome" \
  "/Applications/Chromium.app/Contents/MacOS/Chromium" \
  "/Applications/Microsoft Edge.app/Contents/MacOS/Microsoft Edge" \
  "/c/Program Files/Google/Chrome/Application/chrome.exe" \
  "/c/Program Files (x86)/Microsoft/Edge/Application/msedge.exe"; do
  [ -n "$browser" ] || browser="$(command -v "$name" 2>/dev/null || true)"
done
if [ -z "$browser" ]; then
  echo "slides: no Chrome, Chromium or Edge was found, so the PDF is skipped (CHROME_PATH names one)."
fi

marp() { node node_modules/@marp-team/marp-cli/marp-cli.js --no-config-file --theme theme.css "$@"; }
for deck in part*.md; do
  name="${deck%.md}"
  rm -f "$name.new.html" "$name.new.pdf"
  marp "$deck" --html --template bespoke -o "$name.new.html" 2>&1 | grep -v "INFO" || true
  [ -s "$name.new.html" ] || stop "Marp made no HTML of $deck."
  mv "$name.new.html" "$name.html"
  if [ -n "$browser" ]; then
    # Inside a container or as root the browser's sandbox does not start; the deck is our own file.
    if [ "$(uname -s)" = Linux ]; then export CHROME_NO_SANDBOX=1; fi
    CHROME_PATH="$browser" marp "$deck" --html --pdf --allow-local-files -o "$name.new.pdf" 2>&1 |
      grep -v "INFO\|Insecure local file\|^ *$deck" || true
    [ -s "$name.new.pdf" ] || stop "the browser made no PDF of $deck."
    mv "$name.new.pdf" "$name.pdf"
  fi
  "$PY" pack.py "$deck"
done
