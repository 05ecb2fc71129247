from typing import Literal

from openai import OpenAI
from pydantic import BaseModel


class City(BaseModel):
    name: str
    continent: Literal["Africa", "America", "Asia", "Europe", "Oceania"]


client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
answer = client.chat.completions.parse(
    model="demo",
    messages=[{"role": "user", "content": "Which city is the capital of France?"}],
    response_format=City,
    temperature=0,
)
print(answer.choices[0].message.parsed)
