// The images drawn in the Draw tab since the page was opened, newest first; and the buttons of a drawn image.
import { at, make } from "./dom.js";

/** Add an image. `details`: the text below its name; `actions`: a function for each button, by the button's label. */
export function addToGallery(image, actions) {
  const { name, src, details } = image;
  const picture = make("img", { src, alt: name, className: "drawn" });
  at("images").prepend(make("li", {}, picture, make("strong", {}, name), make("small", {}, details), makeActions(image, actions)));
  at("gallery").hidden = false;
}

/** A button for each action, and a link that saves the image. */
export function makeActions({ name, src, details }, actions) {
  const buttons = Object.entries(actions).map(([label, act]) => {
    const button = make("button", { type: "button", ariaLabel: `${label}: ${name}, ${details}` }, label);
    button.addEventListener("click", act);
    return button;
  });
  const save = make("a", { href: src, download: `${fileName(name)}.png`, ariaLabel: `Save: ${name}, ${details}` }, "Save");
  return make("span", { className: "actions" }, ...buttons, save);
}

function fileName(name) {
  return name.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60) || "image";
}
