// Numbers and elements.

const $ = (id) => document.getElementById(id);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function number(x) {
  if (x === null || x === undefined) return "–";
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size >= 0.001) return String(+x.toPrecision(3));
  const [digits, power] = x.toExponential(1).split("e");
  const raised = [...power.replace("+", "")].map((c) => (c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[+c])).join("");
  return `${digits}·10${raised}`;
}

const count = (n, word, words = word + "s") => `${n} ${n === 1 ? word : words}`;

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") made.className = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function loaded(source) {
  const image = new Image();
  image.src = source;
  return image.decode().then(() => image);
}

// Patches: squares of one sheet, drawn when they are seen.
let sheet = null;

function patch(index, into) {
  const canvas = into || element("canvas", { class: "patch", "aria-hidden": "true" });
  const context = canvas.getContext("2d");
  if (index < 0 || !sheet) {
    context.clearRect(0, 0, canvas.width, canvas.height);
    canvas.classList.add("none");
    return canvas;
  }
  const rows = Math.max(Math.ceil(D.sheet.count / D.sheet.columns), 1);
  const width = sheet.naturalWidth / D.sheet.columns, height = sheet.naturalHeight / rows;
  canvas.width = canvas.height = Math.max(Math.round(width), 8);
  canvas.classList.remove("none");
  context.imageSmoothingEnabled = false;
  const left = (index % D.sheet.columns) * width, top = Math.floor(index / D.sheet.columns) * height;
  context.drawImage(sheet, left, top, width, height, 0, 0, canvas.width, canvas.height);
  return canvas;
}
