// Entry point: reads which model is served, and loads all parts of the page.
import { showModel } from "./about.js";
import "./describe.js";
import { at } from "./dom.js";
import "./draw.js";
import { get } from "./server.js";
import { applyModel } from "./settings.js";
import "./tabs.js";
import "./talk.js";

try {
  const { data } = await get("v1/models");
  showModel(data[0]);
  applyModel(data[0]);
} catch (error) {
  at("page-error").textContent = error.message;
}
