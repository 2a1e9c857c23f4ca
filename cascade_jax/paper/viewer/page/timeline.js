// How many tokens every step drew, and of which kind: a bar for each, under the slider's thumb.

const THUMB = 16; // pixels of the slider's thumb, whose middle is where a step stands

function drawTimeline(step) {
  const canvas = $("timeline"), ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth, height = canvas.clientHeight;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const most = Math.max(...D.steps.map((record) => record.path.length + 1), 2);
  const pitch = (width - THUMB) / Math.max(STEPS, 1), bar = Math.max(Math.min(pitch - 1, 10), 1);
  const colours = KINDS.map((kind) => css(`--${kind.name}`));
  for (let s = 1; s <= STEPS; s++) {
    const x = THUMB / 2 + s * pitch - bar / 2, unit = (height - 1) / most;
    context.globalAlpha = s <= step ? 1 : 0.35;
    for (let place = known[s - 1], level = 0; place < known[s]; place++, level++) {
      context.fillStyle = colours[kindOf[place]];
      const top = height - (level + 1) * unit;
      context.fillRect(x, top, bar, Math.max(unit - (unit > 3 ? 1 : 0), 0.5));
    }
  }
}
