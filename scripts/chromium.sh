#!/bin/sh
# Make sure that there is a Chromium to drive. Never fails: without one the browser tests skip, saying so.
for name in chromium chromium-browser google-chrome; do
    command -v "$name" >/dev/null && exit 0
done
root=""
[ "$(id -u)" = 0 ] || root="sudo -n"
if command -v apt-get >/dev/null && $root true 2>/dev/null; then
    echo "Installing Chromium for the browser tests"
    $root apt-get update -qq >/dev/null 2>&1
    DEBIAN_FRONTEND=noninteractive $root apt-get install -y -qq chromium fonts-noto-cjk >/dev/null 2>&1
fi
command -v chromium >/dev/null || echo "No Chromium: the browser tests will be skipped."
exit 0
