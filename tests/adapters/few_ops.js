// A few operations in plain JavaScript (node, no packages), through the kit's files:
//     python -m npformer.testing --dump DIR --level op
//     node few_ops.js DIR
//     python -m npformer.testing --check DIR
// safetensors: 8 bytes length, a JSON header {name: {dtype, shape, data_offsets}}, then the numbers.

const fs = require("fs");
const path = require("path");

function readTensors(file) {
  const bytes = fs.readFileSync(file);
  const start = 8 + Number(bytes.readBigUInt64LE(0));
  const header = JSON.parse(bytes.toString("utf8", 8, start));
  const tensors = {};
  for (const [name, { dtype, shape, data_offsets: [from, to] }] of Object.entries(header)) {
    const raw = bytes.subarray(start + from, start + to);
    const at = (i) => ({
      F64: () => raw.readDoubleLE(8 * i),
      I64: () => Number(raw.readBigInt64LE(8 * i)),
      BOOL: () => raw[i],
    })[dtype]();
    const size = shape.reduce((a, b) => a * b, 1);
    tensors[name] = { shape, data: Array.from({ length: size }, (_, i) => at(i)) };
  }
  return tensors;
}

function writeTensors(file, tensors) {
  const header = {}, buffers = [];
  let offset = 0;
  for (const [name, { shape, data }] of Object.entries(tensors)) {
    const raw = Buffer.alloc(8 * data.length);
    data.forEach((x, i) => raw.writeDoubleLE(x, 8 * i));
    header[name] = { dtype: "F64", shape, data_offsets: [offset, offset + raw.length] };
    offset += raw.length;
    buffers.push(raw);
  }
  const text = Buffer.from(JSON.stringify(header));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(text.length));
  fs.writeFileSync(file, Buffer.concat([length, text, ...buffers]));
}

const like = (x, data) => ({ shape: x.shape, data });

function relu({ x, dy }) {
  return {
    y: like(x, x.data.map((v) => Math.max(v, 0))),
    "d.x": like(x, dy.data.map((d, i) => (x.data[i] > 0 ? d : 0))),
  };
}

function softmax({ x, mask, dy }) {
  if (mask) return null; // not here
  const S = x.shape.at(-1), y = [], dx = [];
  for (let r = 0; r < x.data.length; r += S) {
    const row = x.data.slice(r, r + S), top = Math.max(...row);
    const e = row.map((v) => Math.exp(v - top));
    const total = e.reduce((a, b) => a + b, 0);
    const p = e.map((v) => v / total);
    const inner = p.reduce((a, v, i) => a + v * dy.data[r + i], 0);
    y.push(...p);
    dx.push(...p.map((v, i) => v * (dy.data[r + i] - inner)));
  }
  return { y: like(x, y), "d.x": like(x, dx) };
}

function linear({ x, weight, bias, dy }) {
  const [O, I] = weight.shape, n = x.data.length / I;
  const y = new Array(n * O).fill(0), dx = new Array(n * I).fill(0);
  const dweight = new Array(O * I).fill(0), dbias = new Array(O).fill(0);
  for (let r = 0; r < n; r++)
    for (let o = 0; o < O; o++) {
      const d = dy.data[r * O + o];
      dbias[o] += d;
      for (let i = 0; i < I; i++) {
        y[r * O + o] += x.data[r * I + i] * weight.data[o * I + i];
        dx[r * I + i] += d * weight.data[o * I + i];
        dweight[o * I + i] += d * x.data[r * I + i];
      }
      if (bias) y[r * O + o] += bias.data[o];
    }
  const found = { y: { shape: [...x.shape.slice(0, -1), O], data: y }, "d.x": like(x, dx) };
  found["d.weight"] = like(weight, dweight);
  return bias ? { ...found, "d.bias": like(bias, dbias) } : found;
}

// LayerNorm as many write it, with eps beside the root and not in it: the kit is to say so.
function layerNorm({ x, weight, bias }, { eps }) {
  const C = x.shape.at(-1), y = [];
  for (let r = 0; r < x.data.length; r += C) {
    const row = x.data.slice(r, r + C), mean = row.reduce((a, b) => a + b, 0) / C;
    const std = Math.sqrt(row.reduce((a, v) => a + (v - mean) ** 2, 0) / C);
    y.push(...row.map((v, i) => (weight.data[i] * (v - mean)) / (std + eps) + bias.data[i]));
  }
  return { y: like(x, y) };
}

const operations = { relu, softmax, linear, layer_norm: layerNorm };
const folder = process.argv[2];
for (const { name, op, options } of JSON.parse(fs.readFileSync(path.join(folder, "manifest.json"))).cases) {
  if (!operations[op]) continue;
  const answer = operations[op](readTensors(path.join(folder, "cases", `${name}.safetensors`)), options);
  if (answer) writeTensors(path.join(folder, "answers", `${name}.safetensors`), answer);
}
