// A step's tree: its root on the left, a column for every place of the output, a row for every branch.

const nodes = []; // buttons, made once and used again, so that the one in focus stays
let chosen = 0;

function layout(step) {
  const record = D.steps[step - 1], parents = parentsOf(step).slice();
  const bonus = parents.length;
  parents.push(record.path.length ? record.path[record.path.length - 1] : 0);
  const children = parents.map(() => []), depths = parents.map(() => 0), rows = parents.map(() => 0);
  const exists = (node) => node === bonus || node === 0 || record.tokens[node] >= 0;
  parents.forEach((parent, node) => {
    if (node && exists(node)) children[parent].push(node);
  });
  let leaves = 0, columns = 0;
  const place = (node, depth) => {
    depths[node] = depth;
    columns = Math.max(columns, depth);
    children[node].forEach((child) => place(child, depth + 1));
    // beside its first child: accepted paths tend to be straight, and a tree reads like an outline
    rows[node] = children[node].length ? rows[children[node][0]] : leaves++;
  };
  place(0, 0);
  return { parents, children, depths, rows, leaves, columns, bonus, exists };
}

function drawTree(step) {
  const tree = $("tree");
  tree.hidden = !step;
  if (!step) return;
  const record = D.steps[step - 1], plan = layout(step), kinds = kindsOf(step);
  kinds[plan.bonus] = BONUS;
  const room = tree.parentElement.clientWidth || 360;
  const across = Math.max(Math.min(Math.floor((room - 36) / Math.max(plan.columns, 1)), 92), 42);
  const down = plan.leaves > 24 ? 28 : room < 480 ? 32 : 36, side = down - 8, top = 22;
  const at = (node) => [plan.depths[node] * across, top + plan.rows[node] * down];
  tree.style.setProperty("--side", `${side}px`);
  tree.style.width = `${plan.columns * across + side + 8}px`;
  tree.style.height = `${top + plan.leaves * down}px`;

  const accepted = new Set([0, ...record.path, plan.bonus]);
  const lines = [];
  plan.parents.forEach((parent, node) => {
    if (!node || !plan.exists(node)) return;
    const [x0, y0] = at(parent), [x1, y1] = at(node), middle = side / 2, bend = x1 - (across - side) / 2;
    const way = `M${x0 + middle},${y0 + middle}H${bend}V${y1 + middle}H${x1}`;
    lines.push([accepted.has(node) ? 1 : 0, `<path class="${accepted.has(node) ? "went" : ""}" d="${way}"/>`]);
  });
  lines.sort((a, b) => a[0] - b[0]);
  let edges = tree.querySelector("svg");
  if (!edges) tree.innerHTML = "<svg aria-hidden='true'></svg><div class='places' aria-hidden='true'></div>";
  edges = tree.querySelector("svg");
  edges.setAttribute("width", plan.columns * across + side + 8);
  edges.setAttribute("height", top + plan.leaves * down);
  edges.innerHTML = lines.map(([, line]) => line).join("");
  tree.querySelector(".places").replaceChildren(
    ...Array.from({ length: plan.columns + 1 }, (_, depth) => {
      const label = element("span", {}, depth ? String(record.position + depth) : "token");
      label.style.left = `${depth * across}px`;
      return label;
    }),
  );

  let used = 0;
  const order = [];
  const visit = (node) => {
    order.push(node);
    plan.children[node].forEach(visit);
  };
  visit(0);
  for (const node of order) {
    const button = nodes[used] || makeNode(tree);
    nodes[used++] = button;
    const kind = KINDS[kinds[node]], [x, y] = at(node);
    button.hidden = false;
    button.node = node;
    button.className = `node ${node === 0 ? "root" : kind.name}`;
    button.style.transform = `translate(${x}px, ${y}px)`;
    button.querySelector("b").textContent = node === 0 ? "" : kind.glyph;
    button.setAttribute("aria-label", label(step, node, plan, kinds));
    paint(record, node, plan, button.querySelector("canvas"));
  }
  for (const button of nodes.slice(used)) button.hidden = true;
}

// a node's patch; the token that the target adds has none, but its cell of the picture
function paint(record, node, plan, canvas) {
  return node === plan.bonus ? cellOf(record.position + record.path.length, canvas) : patch(record.patches[node], canvas);
}

function label(step, node, plan, kinds) {
  if (node === 0) return "the last token before this step";
  if (node === plan.bonus) return "the token that the target adds";
  const rank = plan.children[plan.parents[node]].indexOf(node) + 1;
  return `draft for token ${D.steps[step - 1].position + plan.depths[node]}, choice ${rank}: ${KINDS[kinds[node]].word}`;
}

function makeNode(tree) {
  const button = element("button", { type: "button" }, element("canvas", { class: "patch" }), element("b"));
  button.addEventListener("pointerenter", () => choose(button.node));
  button.addEventListener("focus", () => choose(button.node));
  button.addEventListener("click", () => button.focus());
  tree.append(button);
  return button;
}

// shows a node as the chosen one; it alone is a stop of the Tab key
function markNode(node) {
  chosen = node;
  let found = false;
  for (const button of nodes) {
    const own = !button.hidden && button.node === node;
    found = found || own;
    button.classList.toggle("chosen", own);
    button.tabIndex = own ? 0 : -1;
  }
  if (!found && nodes.length) nodes[0].tabIndex = 0;
}

function moveNode(by) {
  const shown = nodes.filter((button) => !button.hidden);
  if (!shown.length) return;
  const now = shown.findIndex((button) => button.node === chosen);
  shown[Math.min(Math.max(now + by, 0), shown.length - 1)].focus({ preventScroll: false });
}
