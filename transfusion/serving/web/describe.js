// Describing: a picture goes in, by drop, paste or choice, and the model's words come out.
import { at, make, readPicture } from "./parts.js";
import { answerTo } from "./server.js";
import { workOf } from "./work.js";

const begin = workOf(at("describe-form"), work);
const drop = at("drop");

at("file").addEventListener("change", ({ target }) => {
  if (target.files.length) begin(target.files[0]);
  target.value = ""; // the same file may be chosen again
});
// Anywhere on the page: beside the marked place, a browser would leave the page and show the file.
document.addEventListener("dragover", (event) => {
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  drop.classList.add("over");
});
document.addEventListener("dragleave", ({ relatedTarget }) => {
  if (relatedTarget === null) drop.classList.remove("over");
});
document.addEventListener("drop", (event) => {
  drop.classList.remove("over");
  const [file] = event.dataTransfer.files;
  if (!file) return;
  event.preventDefault();
  describe(file);
});
document.addEventListener("paste", (event) => {
  const [file] = event.clipboardData.files;
  if (file && !event.defaultPrevented) describe(file);
});

/** Describe a file, or a drawn picture by its data: URL. */
export function describe(picture) {
  at("describe").scrollIntoView();
  begin(picture);
}

async function work(say, signal, given) {
  say("Reading the picture.");
  const url = typeof given === "string" ? given : await readPicture(given);
  signal.throwIfAborted();
  const picture = make("img", { src: url, alt: given.name ?? "a drawn picture", className: given.name ? "photo" : "drawn" });
  const words = make("q");
  at("described").replaceChildren(picture, words);
  const content = [{ type: "image_url", image_url: { url } }];
  const asked = { messages: [{ role: "user", content }], modalities: ["text"], temperature: 0 }; // the likeliest words
  for await (const { content: more } of answerTo(asked, signal)) words.append(more ?? "");
  say(words.textContent ? `The model says: ${words.textContent}` : "The model said nothing.");
}
