// Keeps a session with the supervisor at BASE_URL through openai-node: reads, asks, streams, an error; prints JSON.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.env.BASE_URL, apiKey: "none", maxRetries: 0 });
const greedy = { model: "small", max_tokens: 8, temperature: 0, ignore_eos: true };
const atlas = { memory_file: "node" };

const read = await client.completions.create({ ...greedy, prompt: process.env.TEXT, max_tokens: 1, atlas });
const messages = [{ role: "user", content: "In short, what does the above say?" }];
const asked = await client.chat.completions.create({ ...greedy, messages, atlas });
let streamed = null;
const stream = await client.chat.completions.create({ ...greedy, messages, atlas, stream: true });
for await (const chunk of stream) streamed = chunk.atlas ?? streamed;
let refused = null;
try {
  await client.chat.completions.create({ ...greedy, messages, atlas: { memory_file: "../node" } });
} catch (error) {
  refused = { status: error.status, type: error.type, param: error.param };
}
const tokens = [read.usage, asked.usage].map((usage) => usage.prompt_tokens);
console.log(JSON.stringify({ tokens, read: read.atlas, asked: asked.atlas, streamed, refused }));
