// The viewer's page side: all drawing happens here, so that moving, windowing, playing and the overlay never wait for
// the kernel.
// Every text comes from outside (models, users, file names) and is written as text, never as markup.

const WINDOW = 255, LEVEL = 127.5;           // grey levels as they are
const KEPT = 256e6;                          // bytes of decoded frames that are kept
const HELP = [['+ −', 'closer, further'], ['arrows', 'move'], ['0', 'whole picture, original grey levels'],
  ['w W', 'narrower, wider window'],
  ['l L', 'lower, higher level'], ['Page Up, Page Down', 'frame before, next'], ['space', 'play, pause'],
    [', .', 'token before, next'], ['[ ]', 'map fainter, stronger'],
  ['m', 'a line to measure with; Shift with arrows moves its end, m again takes the other end'],
  ['mouse', 'drag moves, right drag windows, Shift with drag measures; wheel zooms after a click, or with Ctrl']];

const clamp = (v, low, high) => Math.min(high, Math.max(low, v));
const short = v => Math.abs(v) >= 1e4 || (v && Math.abs(v) < 1e-3) ? v.toExponential(1) : String(+v.toPrecision(3));
const bytes = view => new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
const floats = view => new Float32Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
let count = 0;

function node(tag, attributes = {}, ...children) {
  const n = document.createElement(tag);
  for (const [k, v] of Object.entries(attributes)) k.startsWith('on') ? n.addEventListener(k.slice(2),
    v) : n.setAttribute(k, v);
  n.append(...children);
  // JupyterLab looks for shortcuts before the page's own listeners; this attribute is how it is told to leave keys alone
  n.setAttribute('data-lm-suppress-shortcuts', 'true');
  return n;
}

function slider(label, min, max, step, onInput) {
  const input = node('input',
    { type: 'range', min, max, step, 'aria-label': label, oninput: () => onInput(+input.value) });
  return [input, node('label', {}, node('span', {}, label), input)];
}

function button(label, text,
  act) { return node('button', { type: 'button', 'aria-label': label, title: label, onclick: act }, text); }

// A length that is 1, 2 or 5 times a power of ten and takes at most `most` pixels of the screen
function rulerLength(perUnit, most) {
  const power = 10 ** Math.floor(Math.log10(most / perUnit));
  return [5, 2, 1].map(k => k * power).find(l => l * perUnit <= most) ?? power;
}

class Picture {   // decodes frames, and keeps the last ones that were decoded
  constructor(frames) { this.frames = frames; this.kept = new Map(); this.size = null; }
  async frame(k) {
    if (!this.kept.has(k)) this.kept.set(k, createImageBitmap(new Blob([this.frames[k]], { type: 'image/png' })));
    const bitmap = await this.kept.get(k); this.size = [bitmap.width, bitmap.height];
    const most = Math.max(2, Math.floor(KEPT / (4 * bitmap.width * bitmap.height)));
    for (const old of this.kept.keys()) { if (this.kept.size <= most) break; if (old !== k) this.kept.delete(old); }
    return bitmap;
  }
}

function windowed(bitmap, width,
  level) {   // a canvas with the grey levels from level - width/2 to level + width/2 spread to 0 to 255
  const c = document.createElement('canvas'); c.width = bitmap.width; c.height = bitmap.height;
  const ctx = c.getContext('2d', { willReadFrequently: true }); ctx.drawImage(bitmap, 0, 0);
  if (width === WINDOW && level === LEVEL) return c;
  const table = Uint8ClampedArray.from({ length: 256 }, (_, v) => (v - level + width / 2) / width * 255);
  const pixels = ctx.getImageData(0, 0, c.width, c.height), d = pixels.data;
  for (let i = 0; i < d.length; i += 4) { d[i] = table[d[i]]; d[i + 1] = table[d[i + 1]]; d[i + 2] = table[d[i + 2]]; }
  ctx.putImageData(pixels, 0, 0); return c;
}

function limits(values) {   // lowest and highest, zero among them
  let low = 0, high = 0;
  for (const v of values) { if (v < low) low = v; if (v > high) high = v; }
  return [low, high > low ? high : low + 1e-12];
}

function coloured(values, columns, [low, high],
  table) {   // a canvas of one pixel a cell; what is not a number stays clear
  const c = document.createElement('canvas'), rows = values.length / columns; c.width = columns; c.height = rows;
  const ctx = c.getContext('2d'), pixels = ctx.createImageData(columns, rows);
  values.forEach((v, i) => {
    if (Number.isNaN(v)) return;
    const k = 3 * clamp(Math.round((v - low) / (high - low) * 255), 0, 255);
    pixels.data.set([table[k], table[k + 1], table[k + 2], 255], 4 * i);
  });
  ctx.putImageData(pixels, 0, 0); return c;
}

class View {
  constructor(model, el) {
    this.model = model; this.get = name => model.get(name); this.listeners = []; this.drawn = 0; this.playing = null;
    this.build(el); this.listen(); this.newFrames(); this.newHeat(); this.refresh();
  }

  // What is chosen here is set at once, and told to the kernel when the hand rests
  set(changes, tell = true) {
    for (const [k, v] of Object.entries(changes)) this.model.set(k, v);
    if (!tell) return;
    clearTimeout(this.telling);
    this.telling = setTimeout(() => this.tell(), 150);
  }

  tell() { clearTimeout(this.telling); this.telling = null; this.model.save_changes(); }

  build(el) {
    this.id = `fada-viewer-${++count}`;
    this.canvas = node('canvas', { class: 'picture', tabindex: 0, role: 'application',
      'aria-roledescription': 'picture', 'aria-describedby': `${this.id}-keys` });
    this.empty = node('div', { class: 'empty' }, 'No picture yet');
    this.stage = node('div', { class: 'stage' }, this.canvas, this.empty);
    this.tokens = node('div',
      { class: 'tokens', role: 'radiogroup', 'aria-label': 'Whose map: the whole answer, or one of its tokens' });
    this.told = node('div', { class: 'told', role: 'status' });
    const keys = node('dl', { id: `${this.id}-keys` },
      ...HELP.map(([k, what]) => node('div', {}, node('dt', {}, k), node('dd', {}, what))));
    this.root = node('div', { class: 'fada-viewer', role: 'group', 'aria-label': 'Picture and maps' }, this.stage,
      this.cineBar(), this.tokens, this.mapBar(), this.viewBar(), this.told,
      node('details', {}, node('summary', {}, 'keys and mouse'), keys));
    el.append(this.root);
  }

  cineBar() {
    [this.frameSlider, this.frameLabel] = slider('frame', 0, 0, 1, v => this.set({ frame: v }));
    this.frameText = node('span', { class: 'number' });
    this.playButton = button('play', '▶', () => this.play(!this.playing));
    return this.cine = node('div', { class: 'bar', role: 'group', 'aria-label': 'cine' },
      button('frame before', '‹', () => this.step(-1)), this.playButton,
      button('next frame', '›', () => this.step(1)), this.frameLabel, this.frameText);
  }

  mapBar() {
    const [opacity, label] = slider('map', 0, 1, .01, v => this.set({ opacity: v })); this.opacitySlider = opacity;
    opacity.setAttribute('aria-label', 'opacity of the map');
    this.colours = node('canvas', { width: 128, height: 10, role: 'img' });
    [this.low, this.high, this.unit, this.most, this.badge] =
      ['number', 'number', 'unit', 'number', 'badge'].map(c => node('span', { class: c }));
    this.note = node('div', { class: 'note' });
    return this.overlay = node('div', {},
      node('div', { class: 'bar scale' }, label, this.low, this.colours, this.high, this.unit, this.most, this.badge),
      this.note);
  }

  viewBar() {
    const [width, widthLabel] = slider('window', 1, 512, 1, v => this.set({ window: v }));
    const [level, levelLabel] = slider('level', 0, 255, .5, v => this.set({ level: v }));
    [this.widthSlider, this.levelSlider] = [width, level];
    return node('div', { class: 'bar', role: 'group', 'aria-label': 'view' },
      button('further', '−', () => this.zoomBy(1 / 1.25)), button('closer', '+', () => this.zoomBy(1.25)),
      button('whole picture, original grey levels', 'reset', () => this.reset()), widthLabel, levelLabel);
  }

  listen() {
    const on = (names, act) => names.split(' ').forEach(n => {
      const f = act.bind(this); this.model.on(`change:${n}`, f); this.listeners.push([n, f]);
    });
    on('frames', this.newFrames); on('frame window level', this.newFrame); on('heat heat_shape tokens', this.newHeat);
    on('token lut', this.newTile);
    on('width zoom pan opacity mm_per_px alt token lut badge note unit box shown mapped every total', this.refresh);
    const s = this.canvas;
    s.addEventListener('pointerdown', e => this.press(e)); s.addEventListener('pointermove', e => this.drag(e));
    for (const name of ['pointerup', 'pointercancel']) s.addEventListener(name, () => this.release());
    s.addEventListener('contextmenu', e => { e.preventDefault(); e.stopPropagation(); });
    s.addEventListener('dblclick', () => this.reset());
    s.addEventListener('wheel', e => {   // a page that scrolls by must not zoom
      if (document.activeElement !== s && !e.ctrlKey) return;
      e.preventDefault(); if (e.shiftKey) return this.step(Math.sign(e.deltaY || e.deltaX));
      this.zoomBy(Math.exp(-clamp(e.deltaY, -200, 200) / 400), [e.offsetX, e.offsetY]);
    }, { passive: false });
    this.root.addEventListener('keydown', e => {
      e.stopPropagation(); if (!e.ctrlKey && !e.metaKey && !e.altKey && this.key(e)) e.preventDefault();
    });
    for (const name of ['keyup', 'keypress']) this.root.addEventListener(name, e => e.stopPropagation());
    // who does something elsewhere, such as asking, means the frame in sight: the kernel must know it first
    this.elsewhere = e => {
      if (this.root.contains(e.target)) return;
      if (this.playing !== null) this.play(false);
      if (this.telling) this.tell();
    };
    for (const name of ['pointerdown', 'keydown']) document.addEventListener(name, this.elsewhere, true);
    this.resized = new ResizeObserver(() => this.paint()); this.resized.observe(this.canvas);
  }

  destroy() {
    this.play(false); this.resized.disconnect(); this.gone = true;
    for (const name of ['pointerdown', 'keydown']) document.removeEventListener(name, this.elsewhere, true);
    for (const [name, f] of this.listeners) this.model.off(`change:${name}`, f);
  }

  // ---- frames
  newFrames() {
    this.play(false); this.picture = new Picture(this.get('frames')); this.bitmap = this.base = this.line = null;
    this.failed = false;
    // another picture starts whole: what was chosen for the last one, and came too late for the kernel to undo, goes
    const start = { frame: 0, zoom: 1, pan: [0, 0], window: WINDOW, level: LEVEL };
    const late = Object.entries(start).filter(([k, v]) => `${this.get(k)}` !== `${v}`);
    if (late.length && this.begun) this.set(Object.fromEntries(late));
    this.begun = true;
    this.newFrame();
  }

  async newFrame() {
    const picture = this.picture, k = this.frame();
    if (!picture.frames.length) return this.refresh();
    try {
      const bitmap = await picture.frame(k);
      if (picture !== this.picture || k !== this.frame() || this.gone) return;   // another was asked for meanwhile
      const key = `${k} ${this.get('window')} ${this.get('level')}`;
      if (!this.base || key !== this.baseKey || this.bitmap !== bitmap) {
        this.base = windowed(bitmap, this.get('window'), this.get('level')); this.baseKey = key;
      }
      this.bitmap = bitmap; this.failed = false;
    } catch { this.base = null; this.failed = true; }
    this.refresh();
  }

  mapped() { return this.tile && this.get('mapped') === this.frame(); }   // a map is of one frame of a cine

  ofFile() {   // which frame of the file is in sight, counted from 1
    const n = this.get('frames').length; return `${this.frame() * this.get('every') + 1} of ${this.get('total') || n}`;
  }

  frame() { return clamp(this.get('frame'), 0, Math.max(0, this.get('frames').length - 1)); }

  step(by, tell = true) {
    const n = this.get('frames').length; if (n > 1) this.set({ frame: (this.frame() + by + n) % n }, tell);
  }

  play(go) {
    cancelAnimationFrame(this.playing); this.playing = null;
    if (go && this.get('frames').length > 1) {
      let last = performance.now();
      const turn = async now => {
        if (now - last >= 1000 / this.get('fps') - 4) {   // the screen's own clock is a few ms off
          last = now; const next = (this.frame() + 1) % this.get('frames').length, mine = this.playing;
          await this.picture.frame(next).catch(() => null);   // what cannot be read is said when it is shown
          if (this.playing !== mine || this.gone) return;
          this.step(1, false);
        }
        this.playing = requestAnimationFrame(turn);
      };
      this.playing = requestAnimationFrame(turn);
    } else if (this.playButton.dataset.on) this.set({ frame: this.frame() });   // the kernel learns where it stopped
    const on = this.playing !== null; this.playButton.dataset.on = on ? '1' : '';
    this.playButton.firstChild.data = on ? '❚❚' : '▶';
    this.playButton.setAttribute('aria-label', on ? 'pause' : 'play'); this.playButton.title = on ? 'pause' : 'play';
  }

  // ---- maps
  newHeat() {
    const [n, rows, columns] = this.get('heat_shape'), size = rows * columns, heat = floats(this.get('heat')),
      words = this.get('tokens');
    const fits = n > 0 && heat.length === n * size && (words.length === n - 1 || !words.length);
    this.maps = fits ? Array.from({ length: n }, (_, i) => heat.subarray(i * size, (i + 1) * size)) : [];
    this.columns = columns;
    this.ranges = fits ? [limits(this.maps[0]), limits(heat.subarray(size))] : [];   // of the answer; of all its tokens
    this.tokens.replaceChildren(...(fits && words.length ? ['whole answer', ...words] : []).map((text, i) => {
      const b = button(i ? `token ${i}: ${text.trim() || 'blank'}` : text, text.trim() || '␣',
        () => this.set({ token: i - 1 }));
      b.setAttribute('role', 'radio'); return b; }));
    this.newTile();
  }

  token() { return this.maps.length ? clamp(this.get('token'), -1, this.maps.length - 2) : -1; }

  newTile() {
    const t = this.token(); this.tile = null; this.table = bytes(this.get('lut'));
    if (this.maps.length) {
      this.range = this.ranges[t < 0 ? 0 : 1]; this.tile = coloured(this.maps[t + 1], this.columns, this.range, this.table);
    }
    this.refresh();
  }

  choose(by) {   // another token; the focus goes with it where it was in the strip
    const n = this.tokens.childElementCount; if (!n) return;
    this.set({ token: (this.token() + 1 + by + n) % n - 1 });
    if (this.tokens.contains(document.activeElement)) this.tokens.children[this.token() + 1].focus();
  }

  // ---- view
  geometry() {   // picture on stage: `at` is its left top corner, `scale` screen pixels a picture pixel
    const w = this.base.width, h = this.base.height, W = this.canvas.clientWidth, H = this.canvas.clientHeight;
    const scale = Math.min(W / w, H / h) * clamp(this.get('zoom'), 1, 32);
    const room = [W / w, H / h].map(r => Math.max(0, .5 - r / (2 * scale)));   // as far as it may move
    const pan = this.get('pan').map((p, i) => clamp(p, -room[i], room[i]));
    return { w, h, W, H, scale, room, pan,
      at: [W / 2 - (.5 + pan[0]) * w * scale, H / 2 - (.5 + pan[1]) * h * scale] };
  }

  zoomBy(factor, point) {   // what lies under `point` stays there
    if (!this.base) return;
    const g = this.geometry(), was = clamp(this.get('zoom'), 1, 32), zoom = clamp(was * factor, 1, 32), f = zoom / was;
    const p = point ?? [g.W / 2, g.H / 2];
    const pan = [[g.W, g.w], [g.H, g.h]].map(([S, s], i) => g.pan[i] + (p[i] - S / 2) / (g.scale * s) * (1 - 1 / f));
    this.set({ zoom, pan }); this.set({ pan: this.geometry().pan });
  }

  moveBy(dx, dy) {   // pixels of the screen
    if (!this.base) return;
    const g = this.geometry();
    this.set({ pan: [clamp(g.pan[0] - dx / (g.scale * g.w), -g.room[0], g.room[0]),
      clamp(g.pan[1] - dy / (g.scale * g.h), -g.room[1], g.room[1])] });
  }

  windowBy(width, level) {
    this.set({ window: clamp(this.get('window') + width, 1, 512), level: clamp(this.get('level') + level, 0, 255) });
  }

  reset() { this.line = null; this.set({ zoom: 1, pan: [0, 0], window: WINDOW, level: LEVEL }); this.refresh(); }

  press(e) {
    this.canvas.focus({ preventScroll: true }); e.preventDefault(); this.canvas.setPointerCapture(e.pointerId);
    const how = e.button === 2 ? 'grey' : e.shiftKey && this.base ? 'line' : 'move';
    this.held = { how, x: e.clientX, y: e.clientY };
    if (this.held.how === 'line') { const p = this.inPicture(e.offsetX, e.offsetY); this.line = [...p, ...p]; }
  }

  drag(e) {
    const h = this.held; if (!h) return;
    const dx = e.clientX - h.x, dy = e.clientY - h.y; h.x = e.clientX; h.y = e.clientY;
    if (h.how === 'grey') this.windowBy(dx, dy / 2);
    else if (h.how === 'move') this.moveBy(dx, dy);
    else { this.line.splice(2, 2, ...this.inPicture(e.offsetX, e.offsetY)); this.refresh(); }
  }

  release() { this.held = null; }

  // ---- measuring, in pixels of the frame
  inPicture(x, y) {
    const g = this.geometry(); return [clamp((x - g.at[0]) / g.scale, 0, g.w), clamp((y - g.at[1]) / g.scale, 0, g.h)];
  }

  measure() {   // a line across the middle quarter of what is in sight; or, where there is one, its other end
    if (!this.base) return;
    const { W, H } = this.geometry(), l = this.line;
    this.line = l ? [l[2], l[3], l[0], l[1]] : [...this.inPicture(.375 * W, H / 2), ...this.inPicture(.625 * W, H / 2)];
    this.refresh();
  }

  moveEnd(dx, dy) {   // by pixels of the screen
    if (!this.line) return;
    const g = this.geometry(), [, , x, y] = this.line;
    this.line.splice(2, 2, clamp(x + dx / g.scale, 0, g.w), clamp(y + dy / g.scale, 0, g.h)); this.refresh();
  }

  length() {
    const px = Math.hypot(this.line[2] - this.line[0], this.line[3] - this.line[1]), mm = this.get('mm_per_px');
    return mm > 0 ? `${(px * mm).toFixed(1)} mm` : `${(px / this.get('shown')).toFixed(0)} px`;
  }

  // ---- keys; true: taken
  key(e) {
    const t = e.target;
    const arrow = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[e.key];
    if (this.tokens.contains(t)) {
      const ends = { Home: -1 - this.token(), End: this.maps.length - 2 - this.token() };
      const by = arrow ? arrow[0] + arrow[1] : ends[e.key];
      if (by !== undefined) { this.choose(by); return true; }
    }
    if (t === this.canvas) {
      const far = .08 * this.canvas.clientWidth;
      if (arrow && e.shiftKey) { this.moveEnd(arrow[0], arrow[1]); return true; }
      if (arrow) { this.moveBy(-far * arrow[0], -far * arrow[1]); return true; }
      if (e.key === ' ') { this.play(!this.playing); return true; }
      if (e.key === 'PageUp' || e.key === 'PageDown') { this.step(e.key === 'PageUp' ? -1 : 1); return true; }
    }
    const opaque = by => this.set({ opacity: clamp(Math.round(100 * (this.get('opacity') + by)) / 100, 0, 1) });
    const act = { '+': () => this.zoomBy(1.25), '=': () => this.zoomBy(1.25), '-': () => this.zoomBy(1 / 1.25),
      0: () => this.reset(), m: () => this.measure(), '[': () => opaque(-.05), ']': () => opaque(.05),
      w: () => this.windowBy(-8, 0), W: () => this.windowBy(8, 0), l: () => this.windowBy(0, -4),
      L: () => this.windowBy(0, 4), ',': () => this.choose(-1), '.': () => this.choose(1) }[e.key];
    if (act) act();
    return !!act;
  }

  // ---- drawing
  refresh() {   // once a frame of the screen, however many changes there were
    this.due ??= requestAnimationFrame(() => {
      this.due = null; if (this.gone) return;
      this.words(); this.fit(); this.paint();
    });
  }

  words() {   // everything beside the canvas
    const n = this.get('frames').length, k = this.frame(), t = this.token(), sent = this.get('shown');
    this.canvas.setAttribute('aria-label', this.get('alt') || 'picture without a description');
    this.empty.hidden = !!this.base;
    this.empty.textContent = this.failed ? 'This picture cannot be read' : n ? 'Reading the picture …' : 'No picture yet';
    this.cine.hidden = n < 2; this.frameSlider.max = Math.max(0, n - 1);
    this.frameText.textContent = this.ofFile(); this.frameSlider.setAttribute('aria-valuetext', this.ofFile());
    for (const [input, v] of [[this.frameSlider, k], [this.widthSlider, this.get('window')],
      [this.levelSlider, this.get('level')], [this.opacitySlider, this.get('opacity')]])
      if (+input.value !== v) input.value = v;
    this.overlay.hidden = !this.mapped(); this.tokens.hidden = !this.tokens.childElementCount;
    if (this.mapped()) this.legend();
    [...this.tokens.children].forEach((b, i) => {
      b.setAttribute('aria-checked', i === t + 1); b.tabIndex = i === t + 1 ? 0 : -1;
    });
    const says = [this.line ? `measured ${this.length()}` : '', n > 1 ? `frame ${this.ofFile()}` : '',
      this.get('every') > 1 ? `one frame in ${this.get('every')} of the file is here` : '',
      `zoom ${short(this.get('zoom'))}×`, `window ${short(this.get('window'))}, level ${short(this.get('level'))}`,
      sent < 1 ? `sent at ${Math.round(100 * sent)} % of its size` : ''];
    if (!this.playing) this.told.textContent = this.base ? says.filter(Boolean).join(' · ') : '';
  }

  legend() {
    const [low, high] = this.range.map(short), ctx = this.colours.getContext('2d'), { width, height } = this.colours;
    for (let x = 0; x < width; x++) {
      const k = 3 * Math.round(x / (width - 1) * 255); ctx.fillStyle = `rgb(${this.table.slice(k, k + 3).join(',')})`;
      ctx.fillRect(x, 0, 1, height);
    }
    this.low.textContent = low; this.high.textContent = high;
    this.colours.setAttribute('aria-label', `colours from ${low} to ${high} ${this.get('unit')}`);
    const t = this.token();   // one token may be faint beside the others
    this.most.textContent = t < 0 ? '' : `this token at most ${short(limits(this.maps[t + 1])[1])}`;
    for (const name of ['unit', 'badge',
      'note']) { this[name].textContent = this.get(name); this[name].hidden = !this.get(name); }
  }

  fit() {   // the canvas's shape is the picture's, within reason; the rest stays black
    this.stage.style.width = `${this.get('width')}px`;
    if (this.base) this.stage.style.aspectRatio = clamp(this.base.width / this.base.height, .6, 4);
  }

  paint() {
    const began = performance.now(), ratio = window.devicePixelRatio || 1, c = this.canvas, W = c.clientWidth,
      H = c.clientHeight;
    if (!W || !H) return;
    const [width, height] = [Math.round(W * ratio), Math.round(H * ratio)];
    if (c.width !== width || c.height !== height) { c.width = width; c.height = height; }
    const ctx = c.getContext('2d'); ctx.setTransform(ratio, 0, 0, ratio, 0, 0); ctx.fillStyle = '#000';
    ctx.fillRect(0, 0, W, H);
    if (!this.base) return;
    const g = this.geometry(), [x, y] = g.at, w = g.w * g.scale, h = g.h * g.scale;
    ctx.imageSmoothingEnabled = true; ctx.drawImage(this.base, x, y, w, h);
    if (this.mapped() && this.get('opacity') > 0) {   // a map may reach beyond the picture: where the model was shown padding
      const [left, top, right, bottom] = this.get('box'); ctx.save(); ctx.beginPath(); ctx.rect(x, y, w, h);
      ctx.clip();
      ctx.globalAlpha = clamp(this.get('opacity'), 0, 1);
      ctx.drawImage(this.tile, x + left * g.scale, y + top * g.scale, (right - left) * g.scale,
        (bottom - top) * g.scale);
      ctx.restore();
    }
    this.ruler(ctx, g);
    c.dataset.drawn = ++this.drawn; c.dataset.ms = (performance.now() - began).toFixed(1);
  }

  // In millimetres where the scale is known, else in pixels of the image as it was given; and the line that measures
  ruler(ctx, g) {
    const mm = this.get('mm_per_px'), per = mm > 0 ? g.scale / mm : g.scale * this.get('shown'),
      length = rulerLength(per, Math.min(160, .4 * g.W));
    const x = 12, y = g.H - 12, end = x + length * per,
      text = mm > 0 ? `${short(length)} mm` : `${short(length)} px (no scale)`;
    const lines = [[[x, y - 6], [x, y], [end, y], [end, y - 6]]], words = [[text, x + 4, y - 8]];
    if (this.line) {
      const [a, b] = [this.line.slice(0, 2),
        this.line.slice(2)].map(p => [g.at[0] + p[0] * g.scale, g.at[1] + p[1] * g.scale]);
      lines.push([a, b]);
      for (const [px, py] of [a, b]) lines.push([[px - 5, py], [px + 5, py]], [[px, py - 5], [px, py + 5]]);
      words.push([this.length(), clamp(Math.max(a[0], b[0]) + 8, 4, g.W - 70), clamp(b[1] - 8, 16, g.H - 4)]);
    }
    ctx.lineJoin = 'round'; ctx.font = '13px system-ui, sans-serif';
    for (const [colour, width] of [['#000', 4], ['#fff', 1.5]]) {   // white on a dark rim: to be read on any picture
      ctx.strokeStyle = colour; ctx.lineWidth = width;
      for (const l of lines) { ctx.beginPath(); l.forEach((p,
        i) => i ? ctx.lineTo(...p) : ctx.moveTo(...p)); ctx.stroke(); }
    }
    ctx.lineWidth = 3; ctx.strokeStyle = '#000'; ctx.fillStyle = '#fff';
    for (const w of words) { ctx.strokeText(...w); ctx.fillText(...w); }
    this.canvas.dataset.ruler = text;
  }
}

function render({ model, el }) {
  const view = new View(model, el);
  return () => view.destroy();
}
export default { render };
