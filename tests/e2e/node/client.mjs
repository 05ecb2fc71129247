// The official Node client against a server, as its users use it: `node client.mjs http://127.0.0.1:8000`.
// Prints what was tried, as JSON. The model may be a silly one: only form is looked at.

import assert from 'node:assert/strict';
import OpenAI from 'openai';
import { zodFunction, zodResponseFormat } from 'openai/helpers/zod';
import { z } from 'zod';

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: 'none', maxRetries: 0 });
const ask = { model: 'demo', messages: [{ role: 'user', content: 'Invent some data.' }], temperature: 1, seed: 1 };

const Person = z.object({
  name: z.string().max(12),
  age: z.number().int().min(0).max(150),
  mood: z.enum(['good', 'bad']),
  nickname: z.string().max(8).nullable(),
  homes: z.array(z.object({ city: z.literal('Oslo'), floor: z.union([z.literal(1), z.literal(2)]) })).max(2),
});
const Weather = z.object({ city: z.enum(['Oslo', 'Rome']), days: z.number().int().min(1).max(9) });
const weather = zodFunction({ name: 'weather', description: 'The weather.', parameters: Weather });
const forced = { ...ask, tools: [weather], tool_choice: 'required', parallel_tool_calls: false, max_tokens: 200 };

const tried = {
  async create() {
    const reply = await client.chat.completions.create({ ...ask, max_tokens: 10 });
    assert.equal(reply.object, 'chat.completion');
    assert.equal(typeof reply.choices[0].message.content, 'string');
    assert.ok(['stop', 'length'].includes(reply.choices[0].finish_reason));
    assert.equal(reply.usage.total_tokens, reply.usage.prompt_tokens + reply.usage.completion_tokens);
  },

  async stream() {
    const fields = { ...ask, temperature: 0, max_tokens: 10 };
    const stream = await client.chat.completions.create({
      ...fields,
      stream: true,
      stream_options: { include_usage: true },
    });
    let text = '';
    let usage;
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta.content ?? '';
      usage = chunk.usage ?? usage;
    }
    const whole = await client.chat.completions.create(fields);
    assert.equal(text, whole.choices[0].message.content);
    assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
  },

  async parse() {
    const reply = await client.chat.completions.parse({
      ...ask,
      max_tokens: 300,
      response_format: zodResponseFormat(Person, 'person'),
    });
    assert.equal(reply.choices[0].finish_reason, 'stop');
    Person.parse(reply.choices[0].message.parsed);
  },

  async 'stream helper'() {
    const stream = client.chat.completions.stream({
      ...ask,
      max_tokens: 300,
      response_format: zodResponseFormat(Person, 'person'),
    });
    let text = '';
    stream.on('content.delta', ({ delta }) => (text += delta));
    const message = await stream.finalMessage();
    Person.parse(message.parsed);
    assert.deepEqual(JSON.parse(text), message.parsed);
  },

  async tools() {
    const reply = await client.chat.completions.parse(forced);
    assert.equal(reply.choices[0].finish_reason, 'tool_calls');
    const [call, ...others] = reply.choices[0].message.tool_calls;
    assert.deepEqual(others, []);
    assert.equal(call.function.name, 'weather');
    Weather.parse(call.function.parsed_arguments);
  },

  async 'tools, streamed'() {
    const done = [];
    const stream = client.chat.completions.stream({
      ...forced,
      tool_choice: { type: 'function', function: { name: 'weather' } },
    });
    stream.on('tool_calls.function.arguments.done', (event) => done.push(event));
    const reply = await stream.finalChatCompletion();
    assert.equal(reply.choices[0].finish_reason, 'tool_calls');
    assert.deepEqual(done.map(({ name, index }) => [name, index]), [['weather', 0]]);
    Weather.parse(reply.choices[0].message.tool_calls[0].function.parsed_arguments);
  },

  async 'a tool and back'() {
    const call = await client.chat.completions.create(forced);
    const { message } = call.choices[0];
    const messages = [
      ...ask.messages,
      message,
      { role: 'tool', tool_call_id: message.tool_calls[0].id, content: 'sunny' },
    ];
    const reply = await client.chat.completions.create({ ...ask, messages, tools: [weather], max_tokens: 10 });
    assert.ok(reply.choices[0].message.content || reply.choices[0].message.tool_calls);
  },

  async refusal() {
    const wrong = { type: 'json_schema', json_schema: { name: 'x', schema: { not: {} } } };
    await assert.rejects(
      client.chat.completions.create({ ...ask, response_format: wrong }),
      (error) => error instanceof OpenAI.BadRequestError && error.param === 'response_format.json_schema.schema',
    );
  },
};

const passed = [];
const failed = {};
for (const [name, attempt] of Object.entries(tried)) {
  try {
    await attempt();
    passed.push(name);
  } catch (error) {
    failed[name] = error.stack;
  }
}
console.log(JSON.stringify({ passed, failed }));
