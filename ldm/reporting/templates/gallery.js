const cards = [...document.querySelectorAll(".card")], dialog = document.querySelector("dialog");
const link = dialog.querySelector("a"), image = dialog.querySelector("img");
const [prompt, about] = dialog.querySelectorAll(".about > p, .about > div");
const [back, next, copy, close] = dialog.querySelectorAll("button");
let shown = 0;
function show(number) {
  shown = (number + cards.length) % cards.length;
  const card = cards[shown], from = card.querySelector("img");
  link.href = image.src = from.src;
  image.alt = prompt.textContent = from.alt;
  image.className = from.className;
  about.replaceChildren(card.querySelector("template").content.cloneNode(true));
  copy.hidden = !about.querySelector("pre");
  copy.textContent = "Copy command";
  if (!dialog.open) dialog.showModal();
}
cards.forEach((card, number) => card.querySelector("a").addEventListener("click", event => {
  if (event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  show(number);
}));
back.onclick = () => show(shown - 1);
next.onclick = () => show(shown + 1);
close.onclick = () => dialog.close();
copy.onclick = async () => {
  const command = about.querySelector("pre");
  getSelection().selectAllChildren(command);
  try {
    await navigator.clipboard.writeText(command.textContent);
    copy.textContent = "Copied";
  } catch {
    copy.textContent = "Press Ctrl+C";
  }
};
dialog.addEventListener("click", event => { if (event.target === dialog) dialog.close(); });
dialog.addEventListener("close", () => cards[shown].querySelector("a").focus());
dialog.addEventListener("keydown", event => {
  if (event.key === "ArrowLeft") show(shown - 1);
  if (event.key === "ArrowRight") show(shown + 1);
});
