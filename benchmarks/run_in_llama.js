// Runs a GGUF file in llama.cpp, as node-llama-cpp brings it: node run_in_llama.js JOB.json
// JOB: {file, prompts: lists of tokens, count, followed: lists of tokens, texts} -> a line {generated: count greedy tokens after each prompt,
// next: the token of the largest logit after each of the followed ones, tokens: of each text}.
const fs = require("fs");

(async () => {
  const { getLlama } = await import(require.resolve("node-llama-cpp"));
  const { file, prompts, count, followed, texts } = JSON.parse(fs.readFileSync(process.argv[2]));
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
  const next = [];
  for (const tokens of followed) {
    await sequence.clearHistory();
    const found = await sequence.controlledEvaluate(tokens.map((token) => [token, { generateNext: { token: true, options: { temperature: 0 } } }]));
    next.push(found.map((each) => each.next.token));
  }
  console.log(JSON.stringify({ generated, next, tokens: texts.map((text) => Array.from(model.tokenize(text, true))) }));
  process.exit(0);
})();
