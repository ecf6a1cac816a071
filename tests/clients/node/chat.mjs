// Chats with the supervisor at BASE_URL through openai-node: whole, streamed, an error; prints JSON.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.env.BASE_URL, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Say hello." }];
const greedy = { max_tokens: 8, temperature: 0, ignore_eos: true };

const whole = await client.chat.completions.create({ model: "auto", messages, ...greedy });
let pieces = 0;
const stream = await client.chat.completions.create({ model: "small", messages, ...greedy, stream: true });
for await (const chunk of stream) pieces += chunk.choices[0]?.delta?.content ? 1 : 0;
const models = [];
for await (const model of client.models.list()) models.push(model.id);
let missing = null;
try {
  await client.chat.completions.create({ model: "none", messages });
} catch (error) {
  missing = { status: error.status, code: error.code };
}
console.log(JSON.stringify({ content: whole.choices[0].message.content, pieces, models, missing }));
