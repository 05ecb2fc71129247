from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")

weather = {
    "type": "function",
    "function": {
        "name": "get_current_weather",
        "description": "获取指定城市的当前天气信息",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["上海", "北京", "广州"], "description": "城市名称"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"], "description": "温度单位"},
            },
            "required": ["city"],
        },
    },
}

answer = client.chat.completions.create(
    model="demo",
    messages=[{"role": "user", "content": "北京今天天气怎么样?"}],
    tools=[weather],
    tool_choice="required",  # 必须调用;"auto" 由模型自己决定
    parallel_tool_calls=False,  # 只调用一次
    temperature=0,
)
for call in answer.choices[0].message.tool_calls:
    print(call.function.name, call.function.arguments)
