// Runs ONNX files in onnxruntime-web (WebAssembly, one thread): node run_in_web.js FOLDER
// FOLDER/NAME.onnx with its inputs in FOLDER/NAME.json ({name: {type, dims, data}}) -> its outputs in FOLDER/NAME.out.json, in that form.
const fs = require("fs");
const path = require("path");
const ort = require("onnxruntime-web");

ort.env.wasm.numThreads = 1;
const plain = (value) => (typeof value === "bigint" ? Number(value) : value);

async function run(file) {
  const session = await ort.InferenceSession.create(new Uint8Array(fs.readFileSync(file)), { executionProviders: ["wasm"] });
  const feeds = {};
  for (const [name, { type, dims, data }] of Object.entries(JSON.parse(fs.readFileSync(file.replace(/onnx$/, "json"))))) {
    feeds[name] = new ort.Tensor(type, type === "int64" ? BigInt64Array.from(data.map(BigInt)) : data, dims);
  }
  const outputs = await session.run(feeds);
  const found = session.outputNames.map((name) => [name, { dims: outputs[name].dims, data: Array.from(outputs[name].data, plain) }]);
  fs.writeFileSync(file.replace(/onnx$/, "out.json"), JSON.stringify(Object.fromEntries(found)));
}

(async () => {
  for (const file of fs.readdirSync(process.argv[2]).filter((name) => name.endsWith(".onnx"))) await run(path.join(process.argv[2], file));
})();
