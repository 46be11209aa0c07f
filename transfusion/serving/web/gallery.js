// What was drawn since the page was opened, the newest first, with what can be done with it.
import { at, make } from "./parts.js";

/** Put a picture on the shelf. `how`: what is said below its name; `actions`: what each of its buttons does, by its word. */
export function keep({ name, src, how }, actions) {
  const buttons = Object.entries(actions).map(([word, act]) => {
    const button = make("button", { type: "button", ariaLabel: `${word}: ${name}, ${how}` }, word);
    button.addEventListener("click", act);
    return button;
  });
  const save = make("a", { href: src, download: `${fileName(name)}.png`, ariaLabel: `Save: ${name}, ${how}` }, "Save");
  const picture = make("img", { src, alt: name, className: "drawn" });
  at("shelf").prepend(make("li", {}, picture, make("strong", {}, name), make("small", {}, how), make("span", {}, ...buttons, save)));
  at("gallery-empty").hidden = true;
}

function fileName(name) {
  return name.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60) || "picture";
}
