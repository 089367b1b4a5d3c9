// Vercel's AI SDK as its users call it; prints what came as one JSON object.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const dgemma = createOpenAICompatible({
  name: "dgemma", baseURL: process.env.OPENAI_BASE_URL, apiKey: process.env.OPENAI_API_KEY,
  includeUsage: true, supportsStructuredOutputs: true,
});
const model = dgemma("tiny");
const prompt = "What is the capital of France?";
const tools = {
  get_weather: tool({
    description: "Weather in a city",
    inputSchema: z.object({ city: z.string().describe("Name of the city") }),
    execute: async () => ({ sky: "cloudy", degrees: 12 }),
  }),
};
const told = {};

told.whole = (await generateText({ model, prompt, seed: 1 })).text;
const streamed = streamText({ model, prompt, seed: 1 });
told.streamed = "";
for await (const part of streamed.textStream) told.streamed += part;
told.usage = (await streamed.usage).totalTokens;

const called = await generateText({
  model, prompt: "Is it sunny in Oslo?", tools, seed: 1, stopWhen: stepCountIs(3),
});
told.steps = called.steps.map((step) => step.toolCalls.map((call) => [call.toolName, call.input]));
told.tools = called.text;

const streamedCalls = streamText({
  model, prompt: "Is it sunny in Oslo?", tools, seed: 1, stopWhen: stepCountIs(3),
});
told.streamedTools = await streamedCalls.text;

const made = await generateObject({ model, prompt, seed: 1, maxOutputTokens: 128, schema: z.object({ city: z.enum(["Paris", "Rome"]) }) });
told.object = typeof made.object.city;
console.log(JSON.stringify(told));
