// Answers as a table: a row a question, a column a model. A row can be explained, accepted, edited or rejected, by buttons or by keys.
// All text enters by textContent; what a person does is sent to the kernel as a message.
const make = (tag, attributes = {}, text = '') => {
  const e = document.createElement(tag);
  for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v);
  e.textContent = text; return e; };
const ACTS = [['where', 'where?', 'where the answer depended on the image (Enter)'], ['accept', '✓', 'accept (a)'], ['edit', '✎', 'edit (e)'], ['reject', '✗', 'reject (r)']];

function guard(mine, limit, tell) {                  // a file too large for the page is refused here: sent, it would break the line without a word
  const check = e => { const f = e.target.files?.[0]; if (!f || f.size <= limit) return;
    e.stopImmediatePropagation(); e.target.value = ''; tell({kind: 'too large', bytes: f.size}); };
  return e => { if (!mine(e.target)) return;         // the file field of ipywidgets is in no document: it is met when a press of its button opens it
    const field = HTMLInputElement.prototype, open = field.click; setTimeout(() => { field.click = open; });
    field.click = function () { if (this.type === 'file') this.addEventListener('change', check, {capture: true, once: true}); return open.call(this); }; }; }

function render({model, el}) {
  const root = make('div', {class: 'fada-answers', 'data-lm-suppress-shortcuts': 'true'}), table = make('table'); root.append(table); el.append(root);
  let chosen = 0, side = 0, drawn = '';
  const fields = new Map();                          // `row side` → the open field of an answer that is being corrected
  const send = (kind, row, where, text = '') => model.send({kind, row, side: where, text});
  const panel = () => root.closest('.fada-ask'), limit = guard(e => panel()?.contains(e), model.get('largest'), m => model.send(m));
  // Lab looks at the focused element itself: without the mark two presses of d on a button delete the cell
  const quiet = e => { if (panel()?.contains(e.target)) e.target.setAttribute('data-lm-suppress-shortcuts', 'true'); };
  document.addEventListener('click', limit, true); document.addEventListener('focusin', quiet);

  function edit(cell, row, where, said) {            // a field below the buttons
    const key = `${row} ${where}`; if (fields.has(key)) return fields.get(key).focus();
    const field = make('input', {type: 'text', 'aria-label': 'the right answer'}); field.value = said.text; cell.append(field); field.focus(); field.select(); fields.set(key, field);
    const close = () => { fields.delete(key); field.remove(); focus(); };
    field.addEventListener('keydown', e => { e.stopPropagation();
      if (e.key === 'Enter') { send('edit', row, where, field.value); close(); } else if (e.key === 'Escape') close(); }); }

  function fill(td, said, row, where) {              // only where something changed; an open field stays as it is, with its text and the focus
    const state = JSON.stringify(said ?? null); if (td.state === state) return; td.state = state;
    const field = fields.get(`${row} ${where}`);
    for (const n of [...td.childNodes]) if (n !== field) n.remove();
    td.prepend(...(said ? contentOf(said, row, where, td) : [])); }

  function contentOf(said, row, where, td) {
    const out = [make('b', {}, said.text)];
    for (const [name, text] of [['reason', said.reason], ['note', said.note], ['error', said.error]]) if (text) out.push(make('small', {class: name}, text));
    if (said.done && !said.error) { const bar = make('span');
      for (const [kind, sign, title] of ACTS) if (kind !== 'where' || said.maps) {
        const b = make('button', {type: 'button', title, 'aria-label': title, tabindex: '-1'}, sign);
        b.addEventListener('click', () => { chosen = row; side = where; kind === 'edit' ? edit(td, row, where, said) : send(kind, row, where); }); bar.append(b); }
      out.push(bar); }
    for (const j of said.judged || []) out.push(make('small', {}, j));
    return out; }

  function frame(rows, titles) {                     // the table without its answers: made anew for other questions or models
    const head = make('tr'); fields.clear(); table.replaceChildren(); if (!rows.length) return;
    for (const t of ['question', ...titles, 'reference, where known']) head.append(make('th', {scope: 'col'}, t)); table.append(head);
    rows.forEach((r, i) => { const tr = make('tr', {tabindex: i === chosen ? '0' : '-1', 'aria-selected': i === chosen});
      tr.append(make('td', {}, r.question), ...titles.map(() => make('td')), make('td', {}, r.reference));
      tr.addEventListener('focus', () => { if (chosen !== i) { chosen = i; mark(); } }); table.append(tr); }); }

  function draw() {
    const had = root.contains(document.activeElement), rows = model.get('rows'), titles = model.get('titles'); chosen = Math.min(chosen, Math.max(0, rows.length-1));
    const asked = JSON.stringify([titles, rows.map(r => [r.question, r.reference])]); if (asked !== drawn) { frame(rows, titles); drawn = asked; }
    lines().forEach((tr, i) => titles.forEach((_, k) => fill(tr.cells[k+1], rows[i].said[k], i, k)));
    if (had && !root.contains(document.activeElement)) focus(); }
  const lines = () => [...table.querySelectorAll('tr')].slice(1);
  const mark = () => lines().forEach((tr, i) => { tr.setAttribute('aria-selected', i === chosen); tr.tabIndex = i === chosen ? 0 : -1; });
  const focus = () => lines()[chosen]?.focus();

  root.addEventListener('keydown', e => {            // nobody else's shortcuts: two presses of d would delete a cell
    e.stopPropagation(); if (e.ctrlKey || e.altKey || e.metaKey || !e.target.closest('tr') || e.target.tagName === 'INPUT') return;
    const r = model.get('rows')[chosen], said = r?.said[side], n = lines().length, titles = model.get('titles').length;
    const go = {ArrowDown: () => { chosen = Math.min(n-1, chosen+1); mark(); focus(); }, ArrowUp: () => { chosen = Math.max(0, chosen-1); mark(); focus(); },
      ArrowRight: () => { side = Math.min(titles-1, side+1); }, ArrowLeft: () => { side = Math.max(0, side-1); }};
    const act = {Enter: 'where', a: 'accept', r: 'reject', e: 'edit'}[e.key];
    if (go[e.key]) go[e.key]();
    else if (act && e.target.tagName !== 'BUTTON' && said?.done && !said.error && (act !== 'where' || said.maps))
      act === 'edit' ? edit(lines()[chosen].cells[side+1], chosen, side, said) : send(act, chosen, side);
    else return;
    e.preventDefault(); });
  model.on('change:rows', draw); model.on('change:titles', draw); draw();
  return () => { document.removeEventListener('click', limit, true); document.removeEventListener('focusin', quiet); model.off('change:rows', draw); model.off('change:titles', draw); }; }

export default {render};
