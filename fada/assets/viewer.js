function render({ model, el }) {
  const canvas = document.createElement('canvas');
  const draw = async () => {
    const frames = model.get('frames'); if (!frames.length) return;
    const picture = await createImageBitmap(new Blob([frames[model.get('frame')]], { type: 'image/png' }));
    canvas.width = picture.width; canvas.height = picture.height; canvas.getContext('2d').drawImage(picture, 0, 0);
  };
  el.append(canvas); model.on('change:frames', draw); model.on('change:frame', draw); draw();
}
export default { render };
