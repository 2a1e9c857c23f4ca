// The trace, and what follows from it: which step drew a token, and why.

const D = JSON.parse(document.getElementById("contents").textContent);
const STEPS = D.steps.length;
const PREFILL = 0, BONUS = 1, STRICT = 2, FIRST = 3, SECOND = 4, REJECTED = 5, UNSEEN = 6;
const CASCADE = D.rule.tau_pos !== null; // the rule has two sets
const MORE = differs((chance, strict) => chance > strict), LESS = differs((chance, strict) => chance < strict);
const LOSSLESS = !MORE && !LESS;
const KINDS = [
  { name: "first", word: "drawn with the prompt", glyph: "" },
  { name: "bonus", word: "added by the target", glyph: "+" },
  { name: "strict", word: "accepted strictly", glyph: "✓" },
  { name: "relaxed", word: CASCADE ? "accepted for its interchangeable siblings" : "accepted by relaxation",
    glyph: CASCADE ? "I" : "R" },
  { name: "second", word: "accepted for its converging children", glyph: "C" },
  { name: "rejected", word: "rejected", glyph: "×" },
  { name: "unseen", word: "not reached", glyph: "" },
];

// whether the rule ever held a draft against another chance than the strict one
function differs(how) {
  const chance = D.fields.indexOf("probability"), strict = D.fields.indexOf("strict");
  return D.steps.some((step) => step.turns.some((row) => how(row[chance], row[strict])));
}

// rows of numbers to objects, when a step is looked at
function turnsOf(step) {
  return D.steps[step - 1].turns.map((row) => Object.fromEntries(D.fields.map((field, i) => [field, row[i]])));
}

function parentsOf(step) {
  return D.parents || D.steps[step - 1].parents;
}

// after so many steps: tokens known, of this method and token by token
const known = [1];
const stepOf = new Int32Array(D.length), kindOf = new Uint8Array(D.length);
D.steps.forEach((step, i) => {
  const reasons = new Map(step.turns.map((row) => [row[0], row[D.fields.indexOf("reason")]]));
  const put = (place, kind) => {
    if (place < D.length) {
      stepOf[place] = i + 1;
      kindOf[place] = kind;
    }
  };
  step.path.forEach((node, depth) => put(step.position + depth, reasons.get(node) || STRICT));
  put(step.position + step.path.length, BONUS);
  known.push(Math.min(step.position + step.path.length + 1, D.length));
});
const knownBeside = (step) => Math.min(step + 1, D.length);

// the place in the output of every cell of the picture
const placeOf = new Int32Array(D.grid[0] * D.grid[1]);
D.cells.forEach((cell, place) => {
  if (cell >= 0) placeOf[cell] = place;
});

// what a node is called: a kind for those with a turn, and for those without
function kindsOf(step) {
  const record = D.steps[step - 1];
  const kinds = record.tokens.map((token) => (token < 0 ? null : UNSEEN));
  kinds[0] = PREFILL;
  for (const turn of turnsOf(step)) kinds[turn.node] = turn.reason === 1 ? REJECTED : turn.reason;
  for (const node of record.path) if (kinds[node] === UNSEEN) kinds[node] = STRICT; // judged as a whole path
  return kinds;
}
