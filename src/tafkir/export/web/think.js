/* Runs the network: onnxruntime-web and the models are in the page itself, packed as text. */
"use strict";

const Thinker = {
  ort: null,
  models: [],
  sessions: new Map(),

  /* Bytes of a packed part of the page; its text is let go. */
  async unpack(id) {
    const holder = document.getElementById(id);
    const bytes = decodeBase64(holder.textContent);
    holder.remove();
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  },

  async load() {
    const [code, binary] = await Promise.all([this.unpack("runtime-js"), this.unpack("runtime-wasm")]);
    const address = URL.createObjectURL(new Blob([code], { type: "text/javascript" }));
    this.ort = await import(address);
    URL.revokeObjectURL(address);
    this.ort.env.wasm.numThreads = 1;
    this.ort.env.wasm.wasmBinary = binary;
    this.ort.env.logLevel = "error";
  },

  async session(model) {
    if (!this.sessions.has(model.name)) {
      const bytes = await this.unpack(`model-${model.name}`);
      this.sessions.set(model.name, await this.ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] }));
    }
    return this.sessions.get(model.name);
  },

  /* One supervision step after the other; each gives the answer, how sure it is of every cell, q, and milliseconds. */
  async *think(model, tokens, maxSteps) {
    const session = await this.session(model), { Tensor } = this.ort;
    const cells = tokens.length, symbols = model.puzzles.symbols.length;
    const size = [1, model.positions, model.hidden_size];
    const start = (vector) => {
      const all = new Float32Array(model.positions * model.hidden_size);
      for (let position = 0; position < model.positions; position++) all.set(vector, position * model.hidden_size);
      return new Tensor("float32", all, size);
    };
    const question = new Tensor("int32", Int32Array.from(tokens), [1, cells]);
    let y = start(model.y_init), z = start(model.z_init);
    for (let step = 1; step <= maxSteps; step++) {
      const began = performance.now();
      const out = await session.run({ tokens: question, y, z });
      const milliseconds = performance.now() - began;
      [y, z] = [out.y_next, out.z_next];
      const read = readLogits(out.logits.data, cells, symbols, model.confidence);
      yield { step, ...read, q: 1 / (1 + Math.exp(-out.q_halt.data[0])), milliseconds };
    }
  },
};

function decodeBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const letters = atob(text), bytes = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i);
  return bytes;
}

/* The most likely symbol of every cell and its probability, by the function that the model was trained with. */
function readLogits(logits, cells, symbols, kind) {
  const answer = new Array(cells), confidence = new Array(cells);
  for (let cell = 0; cell < cells; cell++) {
    let best = 0, total = 0, top = -Infinity;
    for (let s = 0; s < symbols; s++) if (logits[cell * symbols + s] > top) [best, top] = [s, logits[cell * symbols + s]];
    const part = (value) => (kind === "softmax" ? Math.exp(value - top) : value >= 0 ? value + 1 : 1 / (1 - value));
    for (let s = 0; s < symbols; s++) total += part(logits[cell * symbols + s]);
    [answer[cell], confidence[cell]] = [best, part(top) / total];
  }
  return { answer, confidence };
}
