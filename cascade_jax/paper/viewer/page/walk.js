// How the drafts fared that had a turn, and all that is known of one.

function bar(turn) {
  const low = Math.min(turn.strict, turn.probability), high = Math.max(turn.strict, turn.probability);
  const part = (name, from, to) => {
    const made = element("i", { class: name });
    made.style.left = `${100 * from}%`;
    made.style.width = `${100 * Math.max(to - from, 0)}%`;
    return made;
  };
  const made = element("span", { class: "bar", "aria-hidden": "true" }, part("strict", 0, low));
  if (high > low) made.append(part(turn.probability > turn.strict ? "added" : "lacking", low, high));
  if (turn.uniform !== null) {
    const mark = element("u");
    mark.style.left = `${100 * turn.uniform}%`;
    made.append(mark);
  }
  return made;
}

function drawWalk(step) {
  const turns = step ? turnsOf(step) : [], kinds = step ? kindsOf(step) : [], record = step && D.steps[step - 1];
  const rows = turns
    .sort((a, b) => depthOf(step, a.node) - depthOf(step, b.node) || a.node - b.node)
    .map((turn) => {
      const kind = KINDS[kinds[turn.node]];
      const row = element(
        "li",
        { class: kind.name },
        patch(record.patches[turn.node]),
        bar(turn),
        element("span", { class: "u" }, number(turn.uniform)),
        element("b", { title: kind.word }, kind.glyph),
      );
      row.addEventListener("pointerenter", () => choose(turn.node));
      row.node = turn.node;
      return row;
    });
  $("walk").replaceChildren(...rows);
  $("walk-title").hidden = $("walk-note").hidden = !rows.length;
}

function depthOf(step, node) {
  const parents = parentsOf(step);
  let depth = 0;
  for (; node > 0; node = parents[node]) depth++;
  return depth;
}

// a set: its members, each with the mass it brings, and what became of it
function members(step, kind, pairs, total, added) {
  const record = D.steps[step - 1];
  const chips = pairs.map(([node, mass]) =>
    element("span", { class: "chip" }, patch(record.patches[node]), element("span", {}, `${record.tokens[node]}`),
      element("em", {}, number(mass))));
  const sum = element("span", { class: "sum" }, pairs.length ? `together ${number(total)}${added ? "" : ", not added"}` : "empty");
  return element("div", { class: `set ${KINDS[kind].name}` }, element("b", {}, KINDS[kind].glyph), ...chips, sum);
}

function facts(pairs) {
  const list = element("dl", { class: "facts" });
  for (const [name, value, note] of pairs) {
    list.append(element("div", {}, element("dt", {}, name), element("dd", { title: note || "" }, value)));
  }
  return list;
}

function drawDraft(step, node) {
  const panel = $("draft");
  document.querySelectorAll("#walk li").forEach((row) => row.classList.toggle("chosen", row.node === node));
  if (!step) {
    panel.replaceChildren(element("p", {}, "The prompt was read; that pass yields the first token, and no draft was made."));
    return;
  }
  const record = D.steps[step - 1], plan = layout(step), kinds = kindsOf(step), bonus = node === plan.bonus;
  const place = record.position + plan.depths[node];
  const kind = bonus ? KINDS[BONUS] : KINDS[kinds[node]];
  const head = (title, badge) =>
    element("h3", { class: badge ? badge.name : "" }, paint(record, node, plan), element("span", {}, title));
  if (node === 0) {
    const title = `Token ${record.position}, the root`;
    panel.replaceChildren(head(title), facts([["code", `${record.tokens[0]}`]]),
      element("p", {}, "The last token known before this step. The tree was drafted behind it."));
    return;
  }
  if (bonus) {
    const rejected = plan.children[plan.parents[node]].length > 1;
    const from = rejected ? "Drawn from what was left of the target's law when the drafts beside it were rejected."
      : "Drawn from the target's own law.";
    panel.replaceChildren(head(`Token ${place}, ${kind.word}`, kind), facts([["code", `${record.next}`]]),
      element("p", {}, place > D.length ? "It lies beyond the picture's end, and is left out." : from));
    return;
  }
  const rank = plan.children[plan.parents[node]].indexOf(node) + 1;
  const title = `Token ${place}, choice ${rank}: ${kind.word}`;
  const turn = turnsOf(step).find((own) => own.node === node);
  if (!turn) {
    panel.replaceChildren(head(title, kind), facts([["code", `${record.tokens[node]}`]]),
      element("p", {}, record.turns.length
        ? "The walk did not come here: an elder sibling was accepted, or a draft above was not."
        : "Paths are judged as a whole here: a draft has no random number of its own."));
    return;
  }
  const charge = Math.abs(turn.probability - turn.strict);
  const list = [
    ["code", `${record.tokens[node]}`],
    ["drafter p", number(turn.draft), "the draft's probability under the drafter, when its turn came"],
    ["target r", number(turn.target), "its probability in what was left of the target's law then"],
    ["strict chance", number(turn.strict), "min(1, r / p)"],
    ["random number", number(turn.uniform), "accepted if it is below the chance"],
  ];
  if (!LOSSLESS) {
    list.splice(4, 0, ["chance", number(turn.probability), "with what the rule adds"]);
    list.push(["mass added", number(turn.gained), "what the rule added to r"]);
    list.push(["coupled charge", number(charge), "the probability of parting from the strict decoder here"]);
  }
  const budget = D.rule.budget;
  if (budget !== null) {
    const note = `spent before, of what a step may charge (${D.rule.ledger})`;
    list.push(["ledger", `${number(turn.spent)} of ${number(budget)}`, note]);
  }
  const parts = [head(title, kind), bar(turn), facts(list)];
  if (CASCADE) {
    // under the coupled ledger both are asked for, and what that changes is cut to the budget
    const bounded = D.rule.ledger === "coupled";
    const whole = bounded || turn.first === 0 || turn.spent + turn.first <= budget;
    const more = turn.gained - (whole ? turn.first : 0);
    parts.push(members(step, FIRST, turn.interchangeable, turn.first, whole));
    const also = bounded || turn.second === 0 || more > 1e-3 * turn.second;
    parts.push(members(step, SECOND, turn.convergent, turn.second, also));
  }
  panel.replaceChildren(...parts);
}
