// The package `openai` as its users call it; prints what came as one JSON object.
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({ baseURL: process.env.OPENAI_BASE_URL, apiKey: process.env.OPENAI_API_KEY, maxRetries: 0 });
const capital = [{ role: "user", content: "What is the capital of France?" }];
const sunny = [{ role: "user", content: "Is it sunny in Oslo?" }];
const parameters = {
  type: "object",
  properties: { city: { type: "string", description: "Name of the city" } },
  required: ["city"],
};
const weather = { name: "get_weather", description: "Weather in a city", parameters };
const told = {};

const whole = await client.chat.completions.create({ model: "tiny", messages: capital, seed: 1 });
told.whole = whole.choices[0].message.content;

told.streamed = "";
const stream = await client.chat.completions.create({
  model: "tiny", messages: capital, seed: 1, stream: true, stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  told.streamed += chunk.choices[0]?.delta?.content ?? "";
  if (chunk.usage) told.usage = chunk.usage.total_tokens;
}

const tools = [{ type: "function", function: { ...weather, parse: JSON.parse, function: async () => '{"sky": "cloudy", "degrees": 12}' } }];
const runner = client.chat.completions.runTools({ model: "tiny", messages: sunny, tools, seed: 1 });
told.tools = await runner.finalContent();

const streamedRunner = client.chat.completions.runTools({ model: "tiny", messages: sunny, tools, seed: 1, stream: true });
told.streamedTools = await streamedRunner.finalContent();

const City = z.object({ city: z.enum(["Paris", "Rome"]) });
const parsed = await client.chat.completions.parse({
  model: "tiny", messages: capital, seed: 1, max_tokens: 128, response_format: zodResponseFormat(City, "city"),
});
told.parsed = typeof parsed.choices[0].message.parsed.city;

const first = await client.responses.create({ model: "tiny", input: "Is it sunny in Oslo?", tools: [{ type: "function", ...weather }], seed: 1 });
const call = first.output.find((item) => item.type === "function_call");
const output = { type: "function_call_output", call_id: call.call_id, output: '{"sky": "cloudy", "degrees": 12}' };
const second = await client.responses.create({
  model: "tiny", input: [output], previous_response_id: first.id, tools: [{ type: "function", ...weather }], seed: 1,
});
told.response = second.output_text;

const events = client.responses.stream({ model: "tiny", input: "What is the capital of France?", seed: 1 });
told.streamedResponse = (await events.finalResponse()).output_text;

try {
  await client.chat.completions.create({ model: "tiny", messages: capital, logprobs: true });
} catch (problem) {
  told.refused = [problem.status, problem.code, problem.param];
}
console.log(JSON.stringify(told));
