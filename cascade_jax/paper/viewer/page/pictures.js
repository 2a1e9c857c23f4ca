// The pictures as far as they are drawn, and the map of what relaxation cost.

const [ROWS, COLUMNS] = D.grid;
const CELL = Math.max(Math.ceil(640 / COLUMNS), 4); // pixels a cell: a whole number, so that no seams show
const images = {};

function sized(canvas) {
  if (canvas.width !== COLUMNS * CELL) {
    canvas.width = COLUMNS * CELL;
    canvas.height = ROWS * CELL;
  }
  return canvas.getContext("2d");
}

function box(cell) {
  return [(cell % COLUMNS) * CELL, Math.floor(cell / COLUMNS) * CELL];
}

// the first `upTo` tokens of a picture
function drawPart(context, image, upTo) {
  context.imageSmoothingEnabled = true;
  context.drawImage(image, 0, 0, COLUMNS * CELL, ROWS * CELL);
  context.fillStyle = css("--paper");
  for (let cell = 0; cell < placeOf.length; cell++) {
    if (placeOf[cell] >= upTo) context.fillRect(...box(cell), CELL, CELL);
  }
}

function outline(context, from, upTo, colour) {
  context.lineWidth = Math.min(Math.max(CELL / 10, 2), 6);
  for (let place = from; place < upTo; place++) {
    const cell = D.cells[place];
    if (cell < 0) continue;
    const [x, y] = box(cell), inset = context.lineWidth / 2;
    context.strokeStyle = colour(place);
    context.strokeRect(x + inset, y + inset, CELL - 2 * inset, CELL - 2 * inset);
  }
}

function drawPictures(step) {
  const before = step ? known[step - 1] : 0, now = known[step];
  const colours = KINDS.map((kind) => css(`--${kind.name}`));
  const context = sized($("picture"));
  drawPart(context, images.picture, now);
  if (step < STEPS || before < D.length - 1) outline(context, before, now, (place) => colours[kindOf[place]]);
  $("picture-count").textContent = `${now} of ${D.length}`;
  $("picture").setAttribute("aria-label", `the picture with ${now} of ${D.length} tokens`);
  if (!images.beside) return;
  const there = knownBeside(step), other = sized($("beside"));
  drawPart(other, images.beside, there);
  if (there < D.length) outline(other, step ? there - 1 : 0, there, () => colours[BONUS]);
  $("beside-count").textContent = `${there} of ${D.length}`;
  $("beside").setAttribute("aria-label", `the picture drawn token by token, with ${there} of ${D.length} tokens`);
}

function drawHeat() {
  const values = D.maps[$("what").value], most = values.reduce((a, b) => Math.max(a, b), 0);
  sized($("grey")).drawImage(images.picture, 0, 0, COLUMNS * CELL, ROWS * CELL);
  const context = sized($("heat"));
  context.clearRect(0, 0, COLUMNS * CELL, ROWS * CELL);
  context.fillStyle = css("--heat");
  values.forEach((value, cell) => {
    if (value <= 0) return;
    context.globalAlpha = 0.1 + 0.8 * (value / most);
    context.fillRect(...box(cell), CELL, CELL);
  });
  context.globalAlpha = 1;
  $("most").textContent = number(most);
  const what = $("what").selectedOptions[0].textContent;
  $("heat").setAttribute("aria-label", `map of where ${what}, at most ${number(most)}`);
}

// what lies under a pointer: the place in the output, or -1
function placeAt(event) {
  const area = event.currentTarget.getBoundingClientRect();
  const column = Math.floor(((event.clientX - area.left) / area.width) * COLUMNS);
  const row = Math.floor(((event.clientY - area.top) / area.height) * ROWS);
  return column < 0 || row < 0 || column >= COLUMNS || row >= ROWS ? -1 : placeOf[row * COLUMNS + column];
}

function sayPlace(place) {
  const value = D.maps[$("what").value][D.cells[place]];
  return `token ${place + 1}: step ${stepOf[place]}, ${KINDS[kindOf[place]].word}; charge here ${number(value)}`;
}

// the picture's cell at a place of the output, as a patch
function cellOf(place, into) {
  const cell = place < D.length ? D.cells[place] : -1;
  const canvas = patch(-1, into);
  if (cell < 0) return canvas;
  const width = images.picture.naturalWidth / COLUMNS, height = images.picture.naturalHeight / ROWS;
  canvas.width = canvas.height = Math.max(Math.round(width), 8);
  canvas.classList.remove("none");
  const [left, top] = [(cell % COLUMNS) * width, Math.floor(cell / COLUMNS) * height];
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(images.picture, left, top, width, height, 0, 0, canvas.width, canvas.height);
  return canvas;
}
