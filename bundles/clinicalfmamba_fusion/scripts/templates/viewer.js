// Any plane of a volume: its axial slices come as mosaics, the other planes and views are made of them here.
(async () => {
  "use strict";
  const data = JSON.parse(document.getElementById("volume").textContent);
  const [nx, ny, nz] = data.size;
  // the value of voxel (x, y, z), channel c, is at ((z * ny + y) * nx + x) * channels + c
  const strides = [1, nx, nx * ny];

  const load = (uri) =>
    new Promise((resolve, reject) => {
      const image = new Image();
      image.onload = () => resolve(image);
      image.onerror = reject;
      image.src = uri;
    });

  const read = async (uris, channels) => {
    const values = new Uint8ClampedArray(nx * ny * nz * channels);
    const canvas = document.createElement("canvas");
    canvas.width = nx * data.columns;
    canvas.height = ny * data.rows;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    let next = 0;
    for (let slice = 0; slice < nz; slice++) {
      const tile = slice % (data.columns * data.rows);
      if (tile === 0) {
        context.drawImage(await load(uris[slice / (data.columns * data.rows)]), 0, 0);
      }
      const x = (tile % data.columns) * nx;
      const y = Math.floor(tile / data.columns) * ny;
      const pixels = context.getImageData(x, y, nx, ny).data;
      for (let i = 0; i < pixels.length; i += 4) {
        for (let c = 0; c < channels; c++) values[next++] = pixels[i + c];
      }
    }
    return { values, channels };
  };

  const stacks = {};
  for (const [name, { channels, mosaics }] of Object.entries(data.stacks)) {
    stacks[name] = await read(mosaics, channels);
  }
  const grey = (stacks.grey || stacks.fused).values;
  const mri = stacks.mri.values;

  const copy = (stack, voxel, pixels, at) => {
    const from = voxel * stack.channels;
    for (let c = 0; c < 3; c++) pixels[at + c] = stack.values[stack.channels === 3 ? from + c : from];
  };

  const painters = {
    mri: () => (voxel, pixels, at) => copy(stacks.mri, voxel, pixels, at),
    partner: () => (voxel, pixels, at) => copy(stacks.partner, voxel, pixels, at),
    fused: () => (voxel, pixels, at) => copy(stacks.fused, voxel, pixels, at),
    checkerboard: (size) => {
      const side = Math.max(...size.millimetres) / data.squares;
      const square = (index, axis) => Math.floor(((index + 0.5) * size.millimetres[axis]) / size.pixels[axis] / side);
      return (voxel, pixels, at, row, column) => {
        const odd = (square(row, 1) + square(column, 0)) % 2;
        copy(odd ? stacks.partner : stacks.mri, voxel, pixels, at);
      };
    },
    difference: () => (voxel, pixels, at) => {
      const share = (grey[voxel] - mri[voxel]) / 255 / (2 * data.limit) + 0.5;
      const from = 3 * Math.min(255, Math.max(0, Math.floor(share * 256)));
      for (let c = 0; c < 3; c++) pixels[at + c] = data.differenceColours[from + c];
    },
  };

  for (const cut of document.querySelectorAll("[data-plane]")) {
    const axis = data.axes[cut.dataset.plane];
    const [across, down] = [0, 1, 2].filter((other) => other !== axis);
    const size = {
      pixels: [data.size[across], data.size[down]],
      millimetres: [data.fieldOfView[across], data.fieldOfView[down]],
    };
    const [width, height] = size.pixels;
    const views = [...cut.querySelectorAll("img[data-view]")].map((img) => {
      const canvas = document.createElement("canvas");
      canvas.width = width;
      canvas.height = height;
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", img.alt);
      img.replaceWith(canvas);
      const context = canvas.getContext("2d");
      return { context, image: context.createImageData(width, height), paint: painters[img.dataset.view](size) };
    });

    const label = cut.querySelector("label");
    const slider = label.querySelector("input");
    const output = label.querySelector("output");
    const draw = () => {
      const slice = Number(slider.value);
      const number = data.first[axis] + Math.round(slice * data.step[axis]) + 1;
      output.textContent = `slice ${number} of ${data.total[axis]}`;
      for (const { context, image, paint } of views) {
        const pixels = image.data;
        for (let row = 0, at = 0; row < height; row++) {
          let voxel = slice * strides[axis] + row * strides[down];
          for (let column = 0; column < width; column++, at += 4, voxel += strides[across]) {
            paint(voxel, pixels, at, row, column);
            pixels[at + 3] = 255;
          }
        }
        context.putImageData(image, 0, 0);
      }
    };
    slider.max = data.size[axis] - 1;
    slider.value = data.middle[axis];
    slider.addEventListener("input", draw);
    draw();
    label.hidden = false;
  }
})();
