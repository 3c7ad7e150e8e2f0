// A picture to begin with, and a mask painted on it, both as large as what is drawn. Knows nothing of the server.

const INK = "#d0f"; // seen on most pictures; the mask that is sent is white on black
const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

export class Easel {
  #photo = null; // as it came
  #at = [0, 0]; // the brush, in pixels of the mask

  /** `tools` are the form's fields for brush and erase; `failed` is told of a file that is no picture. */
  constructor(tools, failed) {
    this.tools = tools;
    this.failed = failed;
    this.begin = document.getElementById("begin");
    this.root = document.getElementById("easel");
    this.file = document.getElementById("file");
    this.picture = document.getElementById("picture");
    this.mask = document.getElementById("mask");
    this.ring = document.getElementById("brush");
    this.file.addEventListener("change", () => this.file.files.length && this.open(this.file.files[0]));
    document.getElementById("remove").addEventListener("click", () => this.remove());
    document.getElementById("clear-mask").addEventListener("click", () => this.#clearMask());
    tools.brush.addEventListener("input", () => this.#showBrush());
    this.#takeDrops();
    this.#takeStrokes();
    this.#takeKeys();
  }

  /** Whether the model takes pictures. */
  set offered(offered) {
    this.begin.hidden = !offered;
    if (!offered) this.remove();
  }

  /** What a request says of the picture: nothing, or it and, where one was painted, the mask. */
  get fields() {
    if (!this.#photo) return {};
    const fields = { image: this.picture.toDataURL("image/png"), strength: Number(this.tools.strength.value) };
    return this.#isPainted ? { ...fields, mask: this.#whiteOnBlack().toDataURL("image/png") } : fields;
  }

  async open(file) {
    const photo = new Image();
    try {
      photo.src = await read(file);
      await photo.decode();
    } catch {
      this.failed(`Expected a PNG, JPEG or WebP, got ${file.name}, which this browser cannot show.`);
      return;
    }
    this.#photo = photo;
    this.root.hidden = false;
    this.resize(this.picture.width, this.picture.height);
  }

  remove() {
    this.#photo = null;
    this.file.value = "";
    this.root.hidden = true;
  }

  /** Show the middle of the picture at the size that is drawn; a mask painted at another size is gone. */
  resize(width, height) {
    for (const canvas of [this.picture, this.mask]) Object.assign(canvas, { width, height });
    this.#at = [width / 2, height / 2];
    if (!this.#photo) return;
    const context = this.picture.getContext("2d");
    const scale = Math.max(width / this.#photo.naturalWidth, height / this.#photo.naturalHeight);
    const [wide, high] = [this.#photo.naturalWidth * scale, this.#photo.naturalHeight * scale];
    context.imageSmoothingQuality = "high";
    context.drawImage(this.#photo, (width - wide) / 2, (height - high) / 2, wide, high);
    this.#showBrush();
  }

  get #isPainted() {
    const { data } = this.mask.getContext("2d").getImageData(0, 0, this.mask.width, this.mask.height);
    return data.some((value, k) => k % 4 === 3 && value > 0);
  }

  #whiteOnBlack() {
    const { width, height } = this.mask;
    const canvas = Object.assign(document.createElement("canvas"), { width, height });
    const context = canvas.getContext("2d");
    context.drawImage(this.mask, 0, 0);
    for (const [mode, colour] of [["source-in", "#fff"], ["destination-over", "#000"]]) {
      Object.assign(context, { globalCompositeOperation: mode, fillStyle: colour });
      context.fillRect(0, 0, width, height);
    }
    return canvas;
  }

  #clearMask() {
    this.mask.getContext("2d").clearRect(0, 0, this.mask.width, this.mask.height);
  }

  get #brushWidth() {
    return Math.max(1, (Number(this.tools.brush.value) / 100) * this.mask.width);
  }

  #showBrush() {
    const { width, height } = this.mask;
    this.ring.style.left = `${(100 * this.#at[0]) / width}%`;
    this.ring.style.top = `${(100 * this.#at[1]) / height}%`;
    this.ring.style.width = `${(100 * this.#brushWidth) / width}%`;
  }

  /** Bring the brush to a place, and where it is down, paint on the way. */
  #move(to, down) {
    if (down) {
      const context = this.mask.getContext("2d");
      const mode = this.tools.erase.checked ? "destination-out" : "source-over";
      const style = { globalCompositeOperation: mode, lineCap: "round", lineWidth: this.#brushWidth, strokeStyle: INK };
      Object.assign(context, style);
      context.beginPath();
      context.moveTo(...this.#at);
      context.lineTo(to[0] + 0.01, to[1]); // a line of no length would leave nothing
      context.stroke();
    }
    this.#at = to;
    this.#showBrush();
  }

  #takeStrokes() {
    const place = ({ offsetX, offsetY }) => [
      (offsetX / this.mask.clientWidth) * this.mask.width,
      (offsetY / this.mask.clientHeight) * this.mask.height,
    ];
    this.mask.addEventListener("pointerdown", (event) => {
      this.mask.setPointerCapture(event.pointerId);
      this.#at = place(event);
      this.#move(this.#at, true);
    });
    this.mask.addEventListener("pointermove", (event) => this.#move(place(event), event.buttons > 0));
  }

  #takeKeys() {
    this.mask.addEventListener("keydown", (event) => {
      const move = event.key === " " ? [0, 0] : MOVES[event.key];
      if (!move) return;
      event.preventDefault();
      const { width, height } = this.mask;
      const [x, y] = this.#at.map((value, k) => value + (move[k] * width) / 32);
      const to = [Math.min(Math.max(x, 0), width), Math.min(Math.max(y, 0), height)];
      this.#move(to, event.key === " " || event.shiftKey);
    });
  }

  /** A picture may be dropped anywhere on the page; elsewhere a browser would leave the page to show it. */
  #takeDrops() {
    const over = (is) => this.begin.classList.toggle("over", is);
    document.addEventListener("dragover", (event) => {
      event.preventDefault();
      over(true);
    });
    document.addEventListener("dragleave", () => over(false));
    document.addEventListener("drop", (event) => {
      event.preventDefault();
      over(false);
      const [file] = event.dataTransfer.files;
      if (file && !this.begin.hidden) this.open(file);
    });
  }
}

/** A file as a data: URL, the only kind of address that the page may show pictures from. */
function read(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(reader.error));
    reader.readAsDataURL(file);
  });
}
