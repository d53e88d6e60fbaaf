"""A line-based server on TCP port 8000, any number of clients at once: python serve.py ENGINE_OR_CHECKPOINT

Ask it with ``nc localhost 8000``: every line is a question, its answer comes as it is made. Hanging up ends it.
"""

import asyncio
import sys
from functools import partial

from qwen_run import AsyncLLM


async def converse(llm, reader, writer):
    try:
        while line := (await reader.readline()).decode(errors="replace").strip():
            shown = ""
            async for output in llm.generate(await llm.chat_prompt([{"role": "user", "content": line}])):
                text = output.outputs[0].text
                writer.write(text[len(shown) :].encode())
                shown = text
                await writer.drain()  # raises when the client has gone, and the request is given up
            writer.write(b"\n")
    except ConnectionError:
        pass
    finally:
        writer.close()


async def main():
    async with AsyncLLM(sys.argv[1]) as llm:
        server = await asyncio.start_server(partial(converse, llm), "localhost", 8000)
        await server.serve_forever()


asyncio.run(main())
