// The tabs. Keyboard as in the ARIA tabs pattern: arrow keys, Home and End. The address's #name is the open tab.
import { at } from "./dom.js";

const tabs = [...at("tabs").children];
const KEYS = { ArrowLeft: (n) => n - 1, ArrowRight: (n) => n + 1, Home: () => 0, End: () => -1 };

for (const tab of tabs) tab.addEventListener("click", () => showTab(panelOf(tab)));
at("tabs").addEventListener("keydown", (event) => {
  const move = KEYS[event.key];
  if (!move) return;
  event.preventDefault();
  showTab(panelOf(tabs.at(move(tabs.indexOf(event.target)) % tabs.length)));
});
addEventListener("hashchange", openAddress);
openAddress();

/** Show the panel with this id and move the focus to its tab. */
export function showTab(name) {
  select(name);
  history.replaceState(null, "", `#${name}`);
  at(`${name}-tab`).focus();
}

function select(name) {
  for (const tab of tabs) {
    const isSelected = panelOf(tab) === name;
    tab.ariaSelected = String(isSelected);
    tab.tabIndex = isSelected ? 0 : -1;
    at(panelOf(tab)).hidden = !isSelected;
  }
}

function openAddress() {
  const name = location.hash.slice(1);
  if (tabs.some((tab) => panelOf(tab) === name)) select(name);
}

function panelOf(tab) {
  return tab.getAttribute("aria-controls");
}
