// The dialog that asks for the server's key, when the server has asked for it.
import { at } from "./parts.js";

const dialog = at("door");
const field = at("key");
let asked = null; // the one answer that all wait for

/** The key that is typed in. `sentence`: why the server wants it. Throws that sentence when the dialog is dismissed. */
export function askForKey(sentence) {
  asked ??= new Promise((resolve, reject) => {
    at("door-reason").textContent = sentence;
    field.value = dialog.returnValue = "";
    dialog.addEventListener("close", () => {
      asked = null;
      dialog.returnValue === "enter" ? resolve(field.value) : reject(new Error(sentence));
    }, { once: true });
    dialog.showModal();
  });
  return asked;
}
