// Runs a GGUF file in llama.cpp, as node-llama-cpp brings it: node run_in_llama.js JOB.json
// JOB: {file, prompts: lists of tokens, count, texts} -> a line {generated: count greedy tokens after each prompt, tokens: of each text}.
const fs = require("fs");

(async () => {
  const { getLlama } = await import(require.resolve("node-llama-cpp"));
  const { file, prompts, count, texts } = JSON.parse(fs.readFileSync(process.argv[2]));
  const llama = await getLlama({ gpu: false, build: "never", logLevel: "error", maxThreads: 1 });
  const model = await llama.loadModel({ modelPath: file });
  const cache = { experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32" };
  const sequence = (await model.createContext({ contextSize: 256, flashAttention: false, ...cache })).getSequence();
  const generated = [];
  for (const prompt of prompts) {
    await sequence.clearHistory();
    const tokens = [];
    for await (const token of sequence.evaluate(prompt, { temperature: 0, yieldEogToken: true })) {
      if (tokens.push(token) >= count) break;
    }
    generated.push(tokens);
  }
  console.log(JSON.stringify({ generated, tokens: texts.map((text) => Array.from(model.tokenize(text, true))) }));
  process.exit(0);
})();
