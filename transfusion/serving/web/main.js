// Where the page begins: asks which model is served, and lets every section be used.
import { tellOf } from "./about.js";
import "./describe.js";
import { fit } from "./dials.js";
import "./draw.js";
import { at } from "./parts.js";
import { get } from "./server.js";
import "./talk.js";

try {
  const { data } = await get("v1/models");
  tellOf(data[0]);
  fit(data[0]);
} catch (problem) {
  at("trouble").textContent = problem.message;
}
