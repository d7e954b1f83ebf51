"use strict";
// The report page. One state (program, pass, node, folds) and one function for each panel that draws it.
// Names from a model are written as text (textContent, createTextNode, canvas), never as markup.

const $ = (id) => document.getElementById(id);
const seen = (window.__zgraph = { ready: false, errors: [] });
window.addEventListener("error", (event) => fail(event.message));
window.addEventListener("unhandledrejection", (event) => fail(String(event.reason)));

function fail(message) {
  seen.errors.push(message);
  $("failed").hidden = false;
  $("failed").textContent = "This page has failed: " + message;
}

const UNITS = [["TiB", 2 ** 40], ["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]];

function bytes(n) {
  for (const [unit, size] of UNITS) if (Math.abs(n) >= size) return figure(n / size) + " " + unit;
  return Math.round(n) + " B";
}

function figure(x) {
  const digits = Math.abs(x) >= 100 ? 0 : Math.abs(x) >= 10 ? 1 : 2;
  return x.toFixed(digits);
}

function seconds(s) {
  const size = Math.abs(s);
  if (size >= 1) return figure(s) + " s";
  if (size >= 1e-3) return figure(s * 1e3) + " ms";
  return size === 0 ? "0 s" : figure(s * 1e6) + " µs";
}

function rate(perSecond, unit) {
  const scale = perSecond >= 1e12 ? [1e12, "T"] : perSecond >= 1e9 ? [1e9, "G"] : [1e6, "M"];
  return figure(perSecond / scale[0]) + " " + scale[1] + unit;
}

const count = (n) => n.toLocaleString("en-US");
const signed = (value, show) => (value === 0 ? "" : (value > 0 ? "+" : "−") + show(Math.abs(value)));
const percent = (x) => (100 * x).toFixed(1).replace(/^-(?=0\.0$)/, "") + " %";
const optionsText = (options) => Object.entries(options).map(([name, value]) => `${name}=${value}`).join(", ");
const short = (operator) => operator.replace(/^(aten|_c10d_functional|zgraph|operator)\./, "").replace(/\.default$/, "");

/** An element; properties are set as properties, `class`, `role` and what has a dash as attributes. */
function make(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class" || name === "role" || name.includes("-")) made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

function fill(parent, ...children) {
  parent.replaceChildren(...children);
}
