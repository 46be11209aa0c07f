// The dialog that asks for the API key, when the server requires one.
import { at } from "./dom.js";

const dialog = at("key-dialog");
const field = at("key");
let pending = null; // one promise for all requests that wait

/** The key that the user enters. `reason`: the server's sentence. Rejects with it when the dialog is closed. */
export function askForKey(reason) {
  pending ??= new Promise((resolve, reject) => {
    at("key-reason").textContent = reason;
    field.value = dialog.returnValue = "";
    dialog.addEventListener("close", () => {
      pending = null;
      dialog.returnValue === "enter" ? resolve(field.value) : reject(new Error(reason));
    }, { once: true });
    dialog.showModal();
  });
  return pending;
}
