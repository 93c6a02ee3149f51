#!/usr/bin/env bash
# Draws the pictures of the README again; the page's with a headless Chromium.
set -euo pipefail
cd "$(dirname "$0")/../.."
npformer pronounce --plot docs/pictures/photographically.png photographically
page=$(mktemp --suffix .html)
trap 'rm -f "$page"' EXIT
npformer explain npformer/weights/g2p photographically --out "$page"
chromium --headless=new --no-sandbox --hide-scrollbars --virtual-time-budget=4000 --window-size=1200,820 \
    --screenshot=docs/pictures/page.png "file://$page#decoder.layers.1.cross_attn.weights"
