() => {
  // Runs once, when the page has been built. Knows nothing of models: it mends what only a browser can see.
  const PHONE = 768;
  const chinese = navigator.language.toLowerCase().startsWith("zh");
  document.documentElement.lang = chinese ? "zh-CN" : "en";

  // The one button has a picture only: it gets a name, whichever of the two it is.
  const names = chinese ? { submit: "发送", stop: "停止" } : { submit: "Send", stop: "Stop" };
  const name = () => {
    for (const [kind, words] of Object.entries(names)) {
      const button = document.querySelector(`#message .${kind}-button`);
      if (button && button.title !== words) Object.assign(button, { title: words, ariaLabel: words });
    }
  };
  new MutationObserver(name).observe(document.body, { childList: true, subtree: true });
  name();

  // An answer is copied without the line that stands small under it.
  if (navigator.clipboard && !navigator.clipboard.nibble) {
    const write = navigator.clipboard.writeText.bind(navigator.clipboard);
    navigator.clipboard.writeText = (text) => write(String(text).replace(/\s*<small class="(stats|notice)[^"]*">.*?<\/small>\s*/gs, "\n").trim());
    navigator.clipboard.nibble = true;
  }

  // On a phone the sidebar covers the chat: it starts closed, and closes again when a chat was chosen in it.
  const close = () => {
    const toggle = document.querySelector(".sidebar.open .toggle-button");
    if (toggle && innerWidth <= PHONE) toggle.click();
  };
  const started = Date.now();
  const wait = setInterval(() => {
    if (document.querySelector(".sidebar.open") || Date.now() - started > 3000) {
      clearInterval(wait);
      close();
    }
  }, 50);
  document.addEventListener("click", (event) => {
    if (event.target.closest("#new-chat, #chats label")) setTimeout(close, 100);
  });
}
