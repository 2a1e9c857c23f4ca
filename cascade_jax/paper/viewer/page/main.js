// One number, the step, and everything that is drawn from it.

let at = 0, playing = null;
const slider = $("slider");

function choose(node) {
  if (!at) return;
  markNode(node);
  drawDraft(at, node);
}

// the draft to look at first: one that was relaxed, else the last accepted, else the first
function firstLook(step) {
  const record = D.steps[step - 1], kinds = kindsOf(step);
  const relaxed = kinds.findIndex((kind) => kind === FIRST || kind === SECOND);
  if (relaxed > 0) return relaxed;
  if (record.path.length) return record.path[record.path.length - 1];
  return record.turns.length ? record.turns[0][0] : parentsOf(step).length;
}

function sentence(step) {
  if (!step) return "The pass over the prompt yields the first token. Drafting begins with the next step.";
  const record = D.steps[step - 1], tokens = known[step] - known[step - 1], kinds = kindsOf(step);
  const relaxed = record.path.filter((node) => kinds[node] === FIRST || kinds[node] === SECOND).length;
  if (parentsOf(step).length === 1) return "One pass of the target, one token: there are no drafts.";
  const drafts = record.tokens.filter((token, node) => node && token >= 0).length;
  const drew = `${count(tokens, "token")} from one pass of the target`;
  const parts = [`${drew}: of ${count(drafts, "draft")}, ${record.path.length} accepted`];
  if (relaxed) parts.push(`${relaxed === record.path.length ? "all" : relaxed} of them only because the rule relaxes`);
  const ends = record.diverged ? " The strict decoder, with the same random numbers, would have parted here." : "";
  return `${parts.join(", ")}.${ends}`;
}

function show(step) {
  at = Math.min(Math.max(step, 0), STEPS);
  slider.value = at;
  const text = `step ${at} of ${STEPS}, ${known[at]} of ${D.length} tokens`;
  slider.setAttribute("aria-valuetext", text);
  $("at").textContent = `${at} / ${STEPS}`;
  $("step-title").textContent = at ? `Step ${at}` : "Before the first step";
  $("said").textContent = sentence(at);
  drawPictures(at);
  drawTimeline(at);
  drawTree(at);
  drawWalk(at);
  const focused = document.activeElement && nodes.includes(document.activeElement) && !document.activeElement.hidden;
  const node = at ? (focused ? document.activeElement.node : firstLook(at)) : 0;
  markNode(node);
  drawDraft(at, node);
  document.querySelector(".step").classList.toggle("bare", !at || parentsOf(at).length === 1);
}

function play(on) {
  if (playing !== null) cancelAnimationFrame(playing);
  playing = null;
  $("play").classList.toggle("on", on);
  $("play").setAttribute("aria-label", on ? "pause" : "play");
  $("draft").setAttribute("aria-live", on ? "off" : "polite");
  if (!on) return;
  if (at === STEPS) show(0);
  const pace = Math.min(Math.max(12000 / Math.max(STEPS, 1), 25), 220), from = at;
  let begun = null;
  const turn = (now) => {
    begun = begun ?? now;
    const next = Math.min(from + Math.floor((now - begun) / pace), STEPS);
    if (next !== at) show(next);
    if (at === STEPS) play(false);
    else playing = requestAnimationFrame(turn);
  };
  playing = requestAnimationFrame(turn);
}

const goTo = (step) => {
  play(false);
  show(step);
};

function onKey(event) {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const on = event.target.tagName, ranged = event.target === slider;
  if (on === "SELECT" || (on === "SUMMARY" && event.key === " ")) return;
  const moves = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -STEPS, End: STEPS };
  if (event.key in moves) goTo(at + moves[event.key]);
  else if (event.key === " " && event.target.id !== "theme") play(playing === null);
  else if (event.key in { ArrowUp: 0, ArrowDown: 0 } && !ranged && at) moveNode(event.key === "ArrowUp" ? -1 : 1);
  else return;
  event.preventDefault();
}

function dark() {
  const own = document.documentElement.dataset.theme;
  return own ? own === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function redraw() {
  $("theme").textContent = dark() ? "Light" : "Dark";
  drawHeat();
  show(at);
}

function tell() {
  const steps = count(STEPS, "step"), each = ((D.length - 1) / Math.max(STEPS, 1)).toFixed(1);
  $("kicker").textContent = `${D.method} · ${D.model} · seed ${D.seed}`;
  $("prompt").textContent = D.prompt;
  $("picture-name").textContent = D.method;
  $("lead").textContent = STEPS < D.length - 1
    ? `${D.length} tokens in ${steps} of the target, ${each} a step. Token by token they take ${D.length - 1}.`
    : `${D.length} tokens, one a step.`;
  const listed = (settings) =>
    Object.entries(settings)
      .filter(([, value]) => value !== null)
      .map(([name, value]) => `${name.replace("_", "-")} ${value}`)
      .join(", ");
  const how = [
    ["model", D.model],
    ["method", D.method],
    ["settings", listed(D.settings) || "none"],
    ["tree", D.tree],
    ["seed", `${D.seed}, picture ${D.number}`],
    ["sampling", listed(D.sampling) || "the model's"],
    ["command", D.command],
  ];
  for (const [name, value] of how) if (value) $("how").append(element("dt", {}, name), element("dd", {}, value));
  const relaxed = CASCADE ? [FIRST, SECOND] : LOSSLESS ? [] : [FIRST];
  for (const kind of [STRICT, ...relaxed, REJECTED, UNSEEN, BONUS].map((own) => KINDS[own])) {
    $("legend").append(element("li", {}, element("span", { class: `swatch ${kind.name}` }, kind.glyph), kind.word));
  }
  $("heat-figure").hidden = LOSSLESS;
  $("note-added").hidden = !MORE;
  $("note-lacking").hidden = !LESS;
  $("beside-figure").hidden = !D.beside;
  $("sets-note").hidden = !CASCADE;
}

function listen() {
  slider.max = STEPS;
  slider.addEventListener("input", () => goTo(+slider.value));
  $("play").addEventListener("click", () => play(playing === null));
  $("what").addEventListener("change", drawHeat);
  $("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = dark() ? "light" : "dark";
    redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  addEventListener("resize", () => show(at));
  addEventListener("keydown", onKey);
  for (const id of ["picture", "heat"]) {
    $(id).addEventListener("pointermove", (event) => {
      const place = placeAt(event);
      event.currentTarget.title = place < 0 ? "" : sayPlace(place);
    });
    $(id).addEventListener("click", (event) => {
      const place = placeAt(event);
      if (place >= 0) goTo(stepOf[place]);
    });
  }
}

tell();
listen();
const pictures = [D.picture, D.beside, D.sheet.picture].map((source) => source && loaded(source));
Promise.all(pictures).then(([picture, beside, patches]) => {
  Object.assign(images, { picture, beside });
  sheet = patches;
  const asked = /^#step=(\d+)$/.exec(location.hash);
  at = Math.min(asked ? +asked[1] : Math.floor(STEPS / 2), STEPS);
  redraw();
  document.documentElement.dataset.ready = "true";
});
