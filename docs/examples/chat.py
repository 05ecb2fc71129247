from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
answer = client.chat.completions.create(
    model="demo",
    messages=[{"role": "user", "content": "What is the capital of France?"}],
    temperature=0,
)
print(answer.choices[0].message.content)
