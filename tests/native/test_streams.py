"""Resumable streams are found again in the child that holds them."""

from __future__ import annotations

import asyncio

BODY = {
    "messages": [{"role": "user", "content": "Tell a story."}],
    "stream": True,
    "max_tokens": 40,
    "ignore_eos": True,
}


async def test_an_answer_is_read_on_after_its_client_left(start, smollm2):
    running = await start({"a": smollm2, "b": smollm2}, models={"default_model": "a"})
    await running.chat("a", max_tokens=1)
    response = await running.http.post(
        running.url + "/v1/chat/completions", json=BODY | {"model": "b"}, headers={"X-Conversation-Id": "talk"}
    )
    await response.content.readline()
    response.close()
    query = {"conversation_ids": ["talk", "other"]}
    async with asyncio.timeout(60):
        while True:
            status, found = await running.json("POST", "/v1/streams/lookup", query)
            assert status == 200
            assert [one["conversation_id"] for one in found] == ["talk"]
            if found[0]["is_done"]:
                break
            await asyncio.sleep(0.1)
    async with running.http.get(running.url + "/v1/stream?conv_id=talk") as response:
        assert response.status == 200
        assert (await response.text()).rstrip().endswith("data: [DONE]")
    async with running.http.delete(running.url + "/v1/stream?conv_id=talk") as response:
        assert response.status == 204
    status, _ = await running.json("GET", "/v1/stream?conv_id=talk")
    assert status == 404


async def test_conversations_of_models_that_do_not_run(start, smollm2):
    running = await start({"a": smollm2})
    status, answer = await running.json("GET", "/v1/stream?conv_id=x")
    assert (status, answer["error"]["type"]) == (404, "not_found_error")
    async with running.http.delete(running.url + "/v1/stream?conv_id=x") as response:
        assert response.status == 204
    assert await running.json("POST", "/v1/streams/lookup", {"conversation_ids": ["x"]}) == (200, [])
    assert await running.state("a") == "absent"
