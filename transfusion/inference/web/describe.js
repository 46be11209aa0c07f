// Describing: a picture goes in, by drop, paste or choice, and the model's words come out.
import { at, make, readPicture } from "./parts.js";
import { stream } from "./server.js";
import { workOf } from "./work.js";

const begin = workOf(at("describe-form"), work);
const drop = at("drop");

at("file").addEventListener("change", ({ target }) => {
  if (target.files.length) begin(target.files[0]);
  target.value = ""; // the same file may be chosen again
});
drop.addEventListener("dragover", (event) => {
  event.preventDefault();
  drop.classList.add("over");
});
for (const end of ["dragleave", "drop"]) drop.addEventListener(end, () => drop.classList.remove("over"));
drop.addEventListener("drop", (event) => {
  event.preventDefault();
  if (event.dataTransfer.files.length) begin(event.dataTransfer.files[0]);
});
document.addEventListener("paste", ({ clipboardData }) => {
  if (clipboardData.files.length) describe(clipboardData.files[0]);
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
  for await (const { choices } of stream("v1/chat/completions", asked, signal)) words.append(choices[0].delta.content ?? "");
  say(words.textContent ? `The model says: ${words.textContent}` : "The model said nothing.");
}
