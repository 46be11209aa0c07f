// The Describe tab: an image goes in (dropped, pasted or chosen), and the model's text comes out.
import { at, make, readImage } from "./dom.js";
import { streamChat } from "./server.js";
import { showTab } from "./tabs.js";
import { taskOf } from "./task.js";

const start = taskOf(at("describe-form"), run);
const drop = at("drop");

at("file").addEventListener("change", ({ target }) => {
  if (target.files.length) start(target.files[0]);
  target.value = ""; // the same file can be chosen again
});
// On the whole page: otherwise the browser leaves the page and shows the file.
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

/** Open the tab and describe this image: a file, or a drawn image's data: URL. */
export function describe(image) {
  showTab("describe");
  start(image);
}

async function run(report, signal, source) {
  report("Reading the image.");
  const url = typeof source === "string" ? source : await readImage(source);
  signal.throwIfAborted();
  const image = make("img", { src: url, alt: source.name ?? "a drawn image", className: source.name ? "photo" : "drawn" });
  const text = make("q");
  at("described").replaceChildren(image, text);
  const messages = [{ role: "user", content: [{ type: "image_url", image_url: { url } }] }];
  const body = { messages, modalities: ["text"], temperature: 0 }; // the most likely text
  for await (const { content } of streamChat(body, signal)) text.append(content ?? "");
  report(text.textContent ? `The model's text: ${text.textContent}` : "The model returned no text.");
}
