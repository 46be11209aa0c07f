// The Talk tab: sends the conversation so far; text and images come back in their order.
import { describe } from "./describe.js";
import { at, make, readImage } from "./dom.js";
import { makeActions } from "./gallery.js";
import { streamChat } from "./server.js";
import { countSteps, describeSettings, readSettings } from "./settings.js";
import { taskOf } from "./task.js";

const MAX_PREVIEWS = 12; // of each image

const form = at("talk-form");
const field = at("message");
const log = at("log");
const start = taskOf(form, run);
let conversation = { messages: [] }; // in the API's format
let attachment = null; // a data: URL

form.addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
field.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
at("attachment").addEventListener("change", ({ target }) => {
  if (target.files.length) attachFile(target.files[0]);
  target.value = ""; // the same file can be chosen again
});
field.addEventListener("paste", (event) => {
  const [file] = event.clipboardData.files;
  if (!file) return;
  event.preventDefault();
  attachFile(file);
});
at("start-over").addEventListener("click", () => {
  form.querySelector(".stop").click();
  conversation = { messages: [] };
  log.replaceChildren();
  for (const name of [".status", ".error"]) form.querySelector(name).textContent = "";
  attach(null);
  field.focus();
});

async function attachFile(file) {
  const error = form.querySelector(".error");
  error.textContent = "";
  try {
    attach(await readImage(file));
  } catch (problem) {
    error.textContent = problem.message;
  }
}

function attach(url) {
  attachment = url;
  at("attached").replaceChildren(...(url ? [make("img", { src: url, alt: "the attached image", className: "photo" })] : []));
}

function send() {
  const text = field.value.trim();
  if (!text && !attachment) return;
  start(text, attachment);
  field.value = "";
  attach(null);
}

async function run(report, signal, text, imageUrl) {
  const current = conversation;
  const content = [];
  if (text) content.push({ type: "text", text });
  if (imageUrl) content.push({ type: "image_url", image_url: { url: imageUrl } });
  const question = addTurn("You");
  if (text) question.append(make("q", {}, text));
  if (imageUrl) question.append(make("img", { src: imageUrl, alt: "your image", className: "photo" }));
  const settings = readSettings();
  const { guidance_scale, steps, seed } = settings;
  const body = {
    messages: [...current.messages, { role: "user", content }],
    modalities: at("allow-images").checked ? ["text", "image"] : ["text"],
    guidance_scale, steps, seed, preview_every: Math.ceil(countSteps(settings) / MAX_PREVIEWS),
  };
  const answer = new Answer(text, describeSettings(body));
  report("The model is answering.");
  log.ariaBusy = "true"; // screen readers announce the whole answer, not each word
  try {
    for await (const delta of streamChat(body, signal)) {
      answer.add(delta);
      log.scrollTop = log.scrollHeight;
    }
    if (!answer.parts.length) answer.element.append(make("i", {}, "(empty answer)"));
  } catch (problem) {
    if (!answer.parts.length) {
      for (const element of [question, answer.element]) element.parentElement.remove();
      if (current === conversation && !field.value && !attachment) { // the message can be changed and sent again
        field.value = text;
        attach(imageUrl);
      }
    }
    answer.preview?.remove();
    throw problem;
  } finally {
    log.ariaBusy = "false";
    if (answer.parts.length) current.messages = [...body.messages, answer.message];
  }
  report("");
}

/** An empty element for the content of a new turn. */
function addTurn(speaker) {
  const element = make("p");
  log.append(make("div", { className: speaker === "You" ? "turn own" : "turn" }, make("b", {}, speaker), element));
  log.scrollTop = log.scrollHeight;
  return element;
}

/** The model's answer, on the page and in the API's format. */
class Answer {
  parts = [];
  images = [];
  preview = null; // the image in progress

  constructor(prompt, details) {
    [this.prompt, this.details, this.element] = [prompt, details, addTurn("Model")];
  }

  get message() {
    return { role: "assistant", images: this.images, parts: this.parts };
  }

  add({ content, preview, images = [] }) {
    if (content) this.addText(content);
    if (preview) this.showPreview(preview.image_url.url);
    for (const image of images) this.addImage(image);
  }

  addText(text) {
    if (this.parts.at(-1)?.type !== "text") {
      this.parts.push({ type: "text", text: "" });
      this.element.append(make("q"));
    }
    this.parts.at(-1).text += text;
    this.element.lastChild.append(text);
  }

  showPreview(src) {
    if (this.preview === null) {
      this.preview = make("span", { className: "answer-image" }, make("img", { className: "drawn" }));
      this.element.append(this.preview);
    }
    Object.assign(this.preview.firstChild, { src, alt: `${this.imageName}, in progress` });
  }

  addImage(image) {
    const { url } = image.image_url;
    this.showPreview(url);
    this.preview.firstChild.alt = this.imageName;
    const actions = makeActions({ name: this.imageName, src: url, details: this.details }, { Describe: () => describe(url) });
    this.preview.append(make("small", {}, this.details), actions);
    this.preview = null;
    this.parts.push({ type: "image", image: this.images.length });
    this.images.push(image);
  }

  /** The text before the image, or the prompt. */
  get imageName() {
    const texts = this.parts.filter(({ type, text }) => type === "text" && text.trim());
    return texts.at(-1)?.text.trim() ?? (this.prompt || "an image");
  }
}
