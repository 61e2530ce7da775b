// One picture (or a cine) on a canvas: zoom, pan, window and level, a ruler, and the map of an answer laid over it.
// All of it happens here; the kernel is told what was chosen, never asked for a drawing. Outside text enters by textContent alone.
const PLAY = 80;                                   // ms between two frames of a cine
const make = (tag, attributes = {}, text = '') => {
  const e = document.createElement(tag);
  for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v);
  e.textContent = text; return e; };
const clamp = (v, a, b) => Math.min(b, Math.max(a, v));
const number = v => Math.abs(v) >= 100 || v === 0 ? v.toFixed(0) : Math.abs(v) >= .01 ? v.toPrecision(2) : v.toExponential(1);

function controls(root, model) {
  const bar = make('div', {class: 'bar', role: 'toolbar', 'aria-label': 'view'}), out = {};
  const button = (name, text, title) => { out[name] = make('button', {type: 'button', title, 'aria-label': title}, text); bar.append(out[name]); };
  const range = (name, label, low, high, step) => {
    const l = make('label', {}, label); out[name] = make('input', {type: 'range', min: low, max: high, step, 'aria-label': label});
    l.append(out[name]); bar.append(l); out[name+'Box'] = l; };
  button('closer', '+', 'closer (+)'); button('further', '−', 'further (−)'); button('reset', 'reset', 'whole picture, original grey levels (0)');
  range('window', 'window', 1, 512, 1); range('level', 'level', 0, 255, 1); range('opacity', 'map', 0, 1, .01);
  button('play', '▶', 'play the frames (space)'); range('frame', 'frame', 0, 0, 1);
  root.append(bar); return out; }

function render({model, el}) {
  const root = make('div', {class: 'fada-viewer', 'data-lm-suppress-shortcuts': 'true'}); el.append(root);
  const c = controls(root, model), picture = make('canvas', {class: 'picture', tabindex: '0', role: 'img'});
  const scale = make('div', {class: 'scale'}), low = make('span'), colours = make('canvas', {width: 128, height: 10, 'aria-hidden': 'true'}), high = make('span');
  const unit = make('span'), badge = make('span', {class: 'badge'}), note = make('div', {class: 'note'});
  const tokens = make('div', {class: 'tokens', role: 'radiogroup', 'aria-label': 'whose map: the whole answer, or one of its tokens'});
  const told = make('div', {class: 'told', 'aria-live': 'polite'});
  scale.append(low, colours, high, unit, badge); root.append(picture, tokens, scale, note, told);
  const g = picture.getContext('2d'), grey = document.createElement('canvas'), heat = document.createElement('canvas');
  let bitmaps = [], view = {zoom: 1, x: 0, y: 0}, drag = null, line = null, timer = null;

  const get = k => model.get(k), put = (k, v) => { model.set(k, v); model.save_changes(); };
  const shape = () => get('heat_shape'), shown = () => bitmaps[clamp(get('frame'), 0, bitmaps.length-1)];
  const floats = () => { const d = get('heat'); return d && d.byteLength ? new Float32Array(d.buffer.slice(d.byteOffset, d.byteOffset+d.byteLength)) : null; };

  async function decode() {                          // PNG frames → bitmaps
    const mine = get('frames'); const made = await Promise.all(mine.map(f => createImageBitmap(new Blob([f], {type: 'image/png'}))));
    if (mine !== get('frames')) return;
    bitmaps = made; view = {zoom: 1, x: 0, y: 0}; line = null; c.frame.max = Math.max(0, bitmaps.length-1);
    for (const e of [c.play, c.frameBox]) e.hidden = bitmaps.length < 2;
    if (bitmaps.length) { const b = bitmaps[0]; picture.width = get('width'); picture.height = Math.round(picture.width*b.height/b.width); }
    levels(); draw(); }

  function levels() {                                // window and level: grey values as they are drawn
    const b = shown(); if (!b) return;
    grey.width = b.width; grey.height = b.height; const h = grey.getContext('2d', {willReadFrequently: true}); h.drawImage(b, 0, 0);
    const w = get('window'), l = get('level'); if (w === 255 && l === 127.5) return;
    const d = h.getImageData(0, 0, b.width, b.height), lut = new Uint8ClampedArray(256).map((_, i) => (i-l+w/2)/w*255);
    for (let i = 0; i < d.data.length; i += 4) for (let k = 0; k < 3; k++) d.data[i+k] = lut[d.data[i+k]];
    h.putImageData(d, 0, 0); }

  function limits(values, k, size) {                 // the tokens share one scale, the whole answer has its own; 0 is in both
    const part = k === 0 ? values.subarray(0, size) : values.subarray(size); let a = 0, b = 0;
    for (const v of part) if (Number.isFinite(v)) { a = Math.min(a, v); b = Math.max(b, v); }
    return [a, b > a ? b : a+1e-12]; }

  function colour() {                                // the chosen map as a small picture, one pixel a cell
    const [n, rows, cols] = shape(), values = floats(), has = !!values && n > 0;
    for (const e of [scale, note, c.opacityBox]) e.hidden = !has;
    tokens.hidden = !has || n < 2; if (!has) { heat.width = 0; return; }
    const k = clamp(get('token')+1, 0, n-1), size = rows*cols, [a, b] = limits(values, k, size), lut = new Uint8Array(get('lut').buffer, get('lut').byteOffset);
    heat.width = cols; heat.height = rows; const h = heat.getContext('2d'), d = h.createImageData(cols, rows);
    for (let i = 0; i < size; i++) {
      const v = values[k*size+i], at = Math.round(clamp((v-a)/(b-a), 0, 1)*255)*3;
      d.data.set([lut[at], lut[at+1], lut[at+2], Number.isFinite(v) ? 255 : 0], i*4); }
    h.putImageData(d, 0, 0); low.textContent = number(a); high.textContent = number(b); unit.textContent = get('unit'); badge.textContent = get('badge');
    note.textContent = get('note'); const bar = colours.getContext('2d');
    for (let x = 0; x < 128; x++) { bar.fillStyle = `rgb(${lut.slice(x*2*3, x*2*3+3).join(',')})`; bar.fillRect(x, 0, 1, 10); } }

  function strip() {                                 // a button for the whole answer and for each token
    tokens.replaceChildren(); const words = ['whole answer', ...get('tokens')];
    words.forEach((word, i) => {
      const on = i-1 === get('token'), e = make('button', {type: 'button', role: 'radio', 'aria-checked': on, tabindex: on ? '0' : '-1'}, word.trim() || '␣');
      e.addEventListener('click', () => put('token', i-1)); tokens.append(e); }); }

  const fit = () => picture.width/(shown()?.width || picture.width)*view.zoom;      // canvas pixels per picture pixel
  function draw() {
    const b = shown(); g.setTransform(1, 0, 0, 1, 0, 0); g.fillStyle = '#000'; g.fillRect(0, 0, picture.width, picture.height); if (!b) return;
    const s = fit(); view.x = clamp(view.x, picture.width-b.width*s, 0); view.y = clamp(view.y, picture.height-b.height*s, 0);
    g.setTransform(s, 0, 0, s, view.x, view.y); g.imageSmoothingEnabled = true; g.drawImage(grey, 0, 0);
    if (heat.width && shape()[0]) {
      const [x0, y0, x1, y1] = get('box'); g.save(); g.beginPath(); g.rect(0, 0, b.width, b.height); g.clip();
      g.globalAlpha = get('opacity'); g.drawImage(heat, x0, y0, x1-x0, y1-y0); g.restore(); }
    ruler(s); }

  const length = px => { const mm = get('mm_per_px'); return mm > 0 ? `${(px*mm).toFixed(1)} mm` : `${px.toFixed(0)} px`; };
  function ruler(s) {                                // a bar of a round length, and the line that was measured
    g.setTransform(1, 0, 0, 1, 0, 0); const mm = get('mm_per_px'), per = mm > 0 ? s/mm : s, want = picture.width/4/per, ten = 10**Math.floor(Math.log10(want));
    const long = [5, 2, 1].map(k => k*ten).find(v => v <= want), x = 12, y = picture.height-14; g.lineWidth = 3; g.font = '13px system-ui, sans-serif';
    const said = `${long >= 1 ? long : long.toPrecision(1)} ${mm > 0 ? 'mm' : 'px'}`;
    for (const [stroke, width] of [['#000', 5], ['#fff', 2]]) {
      g.strokeStyle = stroke; g.lineWidth = width; g.beginPath(); g.moveTo(x, y); g.lineTo(x+long*per, y); g.stroke();
      if (line) { g.beginPath(); g.moveTo(line[0]*s+view.x, line[1]*s+view.y); g.lineTo(line[2]*s+view.x, line[3]*s+view.y); g.stroke(); } }
    const words = [[said, x, y-6]]; if (line) words.push([length(Math.hypot(line[2]-line[0], line[3]-line[1])), line[2]*s+view.x+6, line[3]*s+view.y]);
    for (const [t, tx, ty] of words) { g.lineWidth = 3; g.strokeStyle = '#000'; g.strokeText(t, tx, ty); g.fillStyle = '#fff'; g.fillText(t, tx, ty); }
    picture.dataset.ruler = said; }

  function zoom(times, x = picture.width/2, y = picture.height/2) {
    const z = clamp(view.zoom*times, 1, 16), k = z/view.zoom; view = {zoom: z, x: x-(x-view.x)*k, y: y-(y-view.y)*k}; draw(); }
  const at = e => { const r = picture.getBoundingClientRect(); return [(e.clientX-r.left)*picture.width/r.width, (e.clientY-r.top)*picture.height/r.height]; };
  const inPicture = ([x, y]) => [(x-view.x)/fit(), (y-view.y)/fit()];

  function reset() { view = {zoom: 1, x: 0, y: 0}; line = null; model.set('window', 255); model.set('level', 127.5); model.save_changes(); levels(); draw(); }
  function step(by) { if (bitmaps.length > 1) put('frame', (get('frame')+by+bitmaps.length)%bitmaps.length); }
  function play() { if (timer) { clearInterval(timer); timer = null; } else if (bitmaps.length > 1) timer = setInterval(() => step(1), PLAY); c.play.textContent = timer ? '❚❚' : '▶'; }
  function choose(by) { const n = Math.max(1, shape()[0]); if (floats()) put('token', (get('token')+1+by+n)%n-1); }

  picture.addEventListener('wheel', e => { e.preventDefault(); e.shiftKey ? step(Math.sign(e.deltaY)) : zoom(e.deltaY < 0 ? 1.15 : 1/1.15, ...at(e)); }, {passive: false});
  picture.addEventListener('contextmenu', e => e.preventDefault());
  picture.addEventListener('pointerdown', e => { picture.setPointerCapture(e.pointerId);
    drag = {at: at(e), view: {...view}, window: get('window'), level: get('level'), how: e.button === 2 ? 'levels' : e.shiftKey ? 'measure' : 'pan'};
    if (drag.how === 'measure') { const p = inPicture(drag.at); line = [...p, ...p]; } });
  picture.addEventListener('pointermove', e => { if (!drag) return; const [x, y] = at(e), dx = x-drag.at[0], dy = y-drag.at[1];
    if (drag.how === 'pan') { view.x = drag.view.x+dx; view.y = drag.view.y+dy; }
    else if (drag.how === 'measure') line.splice(2, 2, ...inPicture([x, y]));
    else { model.set('window', clamp(drag.window+dx, 1, 512)); model.set('level', clamp(drag.level+dy, 0, 255)); levels(); }
    draw(); });
  picture.addEventListener('pointerup', () => { if (drag?.how === 'measure') told.textContent = `measured: ${length(Math.hypot(line[2]-line[0], line[3]-line[1]))}`; if (drag) model.save_changes(); drag = null; });

  const KEYS = {'+': () => zoom(1.25), '=': () => zoom(1.25), '-': () => zoom(.8), '0': reset, ' ': play, PageUp: () => step(-1), PageDown: () => step(1),
    '[': () => put('opacity', clamp(get('opacity')-.1, 0, 1)), ']': () => put('opacity', clamp(get('opacity')+.1, 0, 1)), ',': () => choose(-1), '.': () => choose(1)};
  const PAN = {ArrowLeft: [1, 0], ArrowRight: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1]};
  root.addEventListener('keydown', e => {            // what is typed here is nobody else's shortcut: two presses of d delete a cell
    e.stopPropagation(); if (e.ctrlKey || e.altKey || e.metaKey) return; const inTokens = tokens.contains(e.target);
    if (inTokens && /^Arrow/.test(e.key)) { choose(/Left|Up/.test(e.key) ? -1 : 1); tokens.querySelector('[aria-checked=true]')?.focus(); return e.preventDefault(); }
    if (e.target !== picture && (e.key === ' ' || /^Arrow|^Page/.test(e.key))) return;
    if (KEYS[e.key]) { KEYS[e.key](); e.preventDefault(); }
    else if (PAN[e.key]) { view.x += PAN[e.key][0]*20; view.y += PAN[e.key][1]*20; draw(); e.preventDefault(); } });

  c.closer.onclick = () => zoom(1.25); c.further.onclick = () => zoom(.8); c.reset.onclick = reset; c.play.onclick = play;
  c.frame.oninput = () => put('frame', +c.frame.value);
  for (const k of ['window', 'level', 'opacity']) { c[k].oninput = () => model.set(k, +c[k].value); c[k].onchange = () => model.save_changes(); }
  const sliders = () => { for (const k of ['window', 'level', 'opacity', 'frame']) if (document.activeElement !== c[k] || +c[k].value !== get(k)) c[k].value = get(k); };
  const on = {'change:frames': decode, 'change:frame change:window change:level': () => { sliders(); levels(); draw(); },
    'change:heat change:heat_shape change:lut change:unit change:badge change:note': () => { colour(); draw(); }, 'change:tokens': strip,
    'change:token': () => { const t0 = performance.now(); strip(); colour(); draw(); picture.dataset.ms = performance.now()-t0; },
    'change:opacity': () => { const t0 = performance.now(); sliders(); draw(); picture.dataset.ms = performance.now()-t0; },
    'change:box change:mm_per_px': draw, 'change:alt': () => picture.setAttribute('aria-label', get('alt'))};
  for (const [names, f] of Object.entries(on)) model.on(names, f);
  picture.setAttribute('aria-label', get('alt')); sliders(); strip(); colour(); decode();
  return () => { clearInterval(timer); for (const [names, f] of Object.entries(on)) model.off(names, f); }; }

export default {render};
