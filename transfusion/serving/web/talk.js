// Talking: what was said so far goes out, and text and pictures come back in their order.
import { inWords, settings, stepsOf } from "./dials.js";
import { keepDrawn } from "./draw.js";
import { at, make, readPicture } from "./parts.js";
import { answerTo } from "./server.js";
import { workOf } from "./work.js";

const PREVIEWS = 12; // of each picture on its way

const form = at("talk-form");
const field = at("message");
const log = at("log");
const begin = workOf(form, answer);
let talk = { messages: [] }; // as the API has them
let attached = null; // a data: URL

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
  target.value = ""; // the same file may be chosen again
});
field.addEventListener("paste", (event) => {
  const [file] = event.clipboardData.files;
  if (!file) return;
  event.preventDefault();
  attachFile(file);
});
at("over").addEventListener("click", () => {
  form.querySelector(".stop").click();
  talk = { messages: [] };
  log.replaceChildren();
  for (const name of [".status", ".error"]) form.querySelector(name).textContent = "";
  attach(null);
  field.focus();
});

async function attachFile(file) {
  const error = form.querySelector(".error");
  error.textContent = "";
  try {
    attach(await readPicture(file));
  } catch (problem) {
    error.textContent = problem.message;
  }
}

function attach(url) {
  attached = url;
  at("attached").replaceChildren(...(url ? [make("img", { src: url, alt: "the picture that goes with it", className: "photo" })] : []));
}

function send() {
  const text = field.value.trim();
  if (!text && !attached) return;
  begin(text, attached);
  field.value = "";
  attach(null);
}

async function answer(say, signal, text, picture) {
  const mine = talk;
  const content = [];
  if (text) content.push({ type: "text", text });
  if (picture) content.push({ type: "image_url", image_url: { url: picture } });
  const own = turn("You");
  if (text) own.append(make("q", {}, text));
  if (picture) own.append(make("img", { src: picture, alt: "your picture", className: "photo" }));
  const chosen = settings();
  const { guidance_scale, steps, seed } = chosen;
  const asked = {
    messages: [...mine.messages, { role: "user", content }],
    modalities: at("may-draw").checked ? ["text", "image"] : ["text"],
    guidance_scale, steps, seed, preview_every: Math.ceil(stepsOf(chosen) / PREVIEWS),
  };
  const back = new Answer(text, inWords(asked));
  say("The model answers.");
  log.ariaBusy = "true"; // read out when it is whole, not word by word
  try {
    for await (const delta of answerTo(asked, signal)) {
      back.add(delta);
      log.scrollTop = log.scrollHeight;
    }
    if (!back.parts.length) back.place.append(make("i", {}, "nothing"));
  } catch (problem) {
    if (!back.parts.length) {
      for (const place of [own, back.place]) place.parentElement.remove();
      if (mine === talk && !field.value && !attached) { // to be changed and sent again
        field.value = text;
        attach(picture);
      }
    }
    back.onItsWay?.remove();
    throw problem;
  } finally {
    log.ariaBusy = "false";
    if (back.parts.length) mine.messages = [...asked.messages, back.message];
  }
  say("");
}

/** The place for what one side says. */
function turn(who) {
  const place = make("p");
  log.append(make("div", { className: who === "You" ? "turn own" : "turn" }, make("b", {}, who), place));
  log.scrollTop = log.scrollHeight;
  return place;
}

/** What the model says, as it is shown and as it can be given back. */
class Answer {
  parts = [];
  images = [];
  onItsWay = null; // the picture that is being drawn

  constructor(name, how) {
    [this.name, this.how, this.place] = [name || "a picture", how, turn("The model")];
  }

  get message() {
    return { role: "assistant", images: this.images, parts: this.parts };
  }

  add({ content, preview, images = [] }) {
    if (content) this.write(content);
    if (preview) this.show(preview.image_url.url);
    for (const image of images) this.draw(image);
  }

  write(text) {
    if (this.parts.at(-1)?.type !== "text") {
      this.parts.push({ type: "text", text: "" });
      this.place.append(make("q"));
    }
    this.parts.at(-1).text += text;
    this.place.lastChild.append(text);
  }

  show(src) {
    if (this.onItsWay === null) this.place.append((this.onItsWay = make("img", { className: "drawn" })));
    Object.assign(this.onItsWay, { src, alt: `${this.latest}, on its way` });
  }

  draw(image) {
    const { url } = image.image_url;
    this.show(url);
    this.onItsWay.alt = this.latest;
    this.onItsWay = null;
    keepDrawn({ name: this.latest, src: url, how: this.how });
    this.parts.push({ type: "image", image: this.images.length });
    this.images.push(image);
  }

  /** The words that a picture stands behind: they name it. */
  get latest() {
    const texts = this.parts.filter(({ type, text }) => type === "text" && text.trim());
    return texts.at(-1)?.text.trim() ?? this.name;
  }
}
