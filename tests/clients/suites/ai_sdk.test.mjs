// The calls of the Vercel AI SDK's documentation, with its OpenAI-compatible provider and our servers.
import assert from 'node:assert/strict';
import test from 'node:test';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { Output, embed, embedMany, cosineSimilarity, generateText, stepCountIs, streamText, tool } from 'ai';
import { z } from 'zod';

const provider = baseURL =>
  createOpenAICompatible({ name: 'athanor', apiKey: 'none', baseURL, includeUsage: true, supportsStructuredOutputs: true });
const chat = provider(process.env.CHAT_URL)('coder');
const completion = provider(process.env.CHAT_URL).completionModel('coder');
const embedding = provider(process.env.EMBEDDING_URL).textEmbeddingModel('mini');
const common = { model: chat, temperature: 0, maxOutputTokens: 200, maxRetries: 0 };
const question = 'What is the capital of France? Answer in one sentence.';
const city = z.object({ name: z.string().max(20), country: z.string().max(20) });
const weather = called =>
  tool({
    description: 'Get the weather in a location',
    inputSchema: z.object({ location: z.string().max(20).describe('The location to get the weather for') }),
    execute: async ({ location }) => {
      called.push(location);
      return { location, weather: 'snow' };
    },
  });

test('generateText and streamText', async () => {
  const whole = await generateText({ ...common, prompt: question });
  assert.match(whole.text, /Paris/);
  assert.equal(whole.finishReason, 'stop');
  const stream = streamText({ ...common, prompt: question });
  let text = '';
  for await (const piece of stream.textStream) text += piece;
  assert.equal(text, whole.text);
  const usage = await stream.usage;
  assert.equal(usage.outputTokens, whole.usage.outputTokens);
  assert.ok(usage.inputTokens > 0);
});

test('messages with a system message', async () => {
  const messages = [
    { role: 'user', content: 'My name is Ada.' },
    { role: 'assistant', content: 'Hello Ada.' },
    { role: 'user', content: [{ type: 'text', text: 'What is my name?' }] },
  ];
  const { text } = await generateText({ ...common, system: 'Be brief.', messages });
  assert.match(text, /Ada/);
});

test('completion model', async () => {
  const { text } = await generateText({ ...common, model: completion, prompt: 'def add(a, b):\n    return', maxOutputTokens: 8 });
  assert.ok(text.length > 0);
});

test('an object of a schema, whole and streamed', async () => {
  const prompt = 'In which city and country is the Eiffel Tower?';
  const { output } = await generateText({ ...common, prompt, output: Output.object({ schema: city }) });
  assert.equal(city.parse(output).country, 'France');
  const stream = streamText({ ...common, prompt, output: Output.object({ schema: city }) });
  let last;
  for await (const partial of stream.partialOutputStream) last = partial;
  assert.deepEqual(last, output);
});

test('a choice and an array', async () => {
  const choice = Output.choice({ options: ['positive', 'negative'] });
  const { output } = await generateText({ ...common, prompt: 'What a lovely day! Classify the sentiment.', output: choice });
  assert.ok(['positive', 'negative'].includes(output));
  const list = Output.array({ element: z.object({ city: z.string().max(20) }) });
  const { output: cities } = await generateText({ ...common, prompt: 'List two cities.', output: list });
  assert.ok(Array.isArray(cities));
});

for (const toolChoice of ['required', { type: 'tool', toolName: 'weather' }]) {
  test(`a call of a tool: ${JSON.stringify(toolChoice)}`, async () => {
    const called = [];
    const prompt = 'What is the weather in San Francisco?';
    const result = await generateText({ ...common, prompt, tools: { weather: weather(called) }, toolChoice });
    assert.equal(result.finishReason, 'tool-calls');
    assert.deepEqual(result.toolCalls.map(call => call.input.location), called);
    assert.match(called[0], /San Francisco/);
    const stream = streamText({ ...common, prompt, tools: { weather: weather(called) }, toolChoice });
    const kinds = new Set();
    for await (const part of stream.fullStream) kinds.add(part.type);
    assert.ok(kinds.has('tool-input-delta') && kinds.has('tool-call') && kinds.has('tool-result'), [...kinds].join());
  });
}

test('several steps: a call and an answer after its result', async () => {
  const called = [];
  const { text, steps } = await generateText({
    ...common,
    prompt: 'What is the weather in San Francisco?',
    tools: { weather: weather(called) },
    stopWhen: stepCountIs(3),
    prepareStep: ({ stepNumber }) => (stepNumber === 0 ? { toolChoice: 'required' } : { toolChoice: 'none' }),
  });
  // What it makes of the result depends on the model: this small one repeats the call as text.
  assert.deepEqual(steps.map(step => step.finishReason), ['tool-calls', 'stop']);
  assert.equal(called.length, 1);
  assert.ok(text.length > 0);
});

test('an object of a schema with tools', async () => {
  const result = await generateText({
    ...common,
    prompt: 'In which city and country is the Eiffel Tower?',
    tools: { weather: weather([]) },
    output: Output.object({ schema: city }),
    stopWhen: stepCountIs(4),
  });
  city.parse(result.output);
});

test('embed and embedMany', async () => {
  const { embedding: one, usage } = await embed({ model: embedding, value: 'sunny day at the beach' });
  assert.equal(one.length, 384);
  assert.ok(usage.tokens > 0);
  const { embeddings } = await embedMany({ model: embedding, values: ['a sunny day on the shore', 'interest rates rise'] });
  assert.ok(cosineSimilarity(one, embeddings[0]) > cosineSimilarity(one, embeddings[1]));
});

test('an error has its status and message', async () => {
  await assert.rejects(generateText({ ...common, prompt: question, temperature: 3 }), error => {
    assert.equal(error.statusCode, 400);
    assert.match(error.message, /temperature/);
    return true;
  });
});
