"""The metrics of real children, beside the supervisor's own."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families


async def test_children_tell_theirs_with_a_label(start, smollm2, gemma3):
    running = await start({"a": smollm2, "b": gemma3})
    used = {}
    for model in ("a", "b"):
        status, answer = await running.chat(model, max_tokens=5, cache_prompt=False)
        assert status == 200
        used[model] = answer["usage"]
    async with running.http.get(running.url + "/metrics") as response:
        text = await response.text()
    samples = {
        (sample.name, sample.labels.get("model"), sample.labels.get("kind")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    for model, usage in used.items():
        assert samples["llamacpp:tokens_predicted_total", model, None] == usage["completion_tokens"]
        assert samples["llama_supervisor_tokens_total", model, "generated"] == usage["completion_tokens"]
        assert samples["llama_supervisor_tokens_total", model, "prompt"] == usage["prompt_tokens"]
        assert samples["llama_supervisor_model_scraped", model, None] == 1
        assert samples["llama_supervisor_model_memory_bytes", model, None] > 1 << 24
    assert text.count("# TYPE llamacpp:tokens_predicted_total counter") == 1
    assert "\n# TYPE llamacpp:n_tokens_max unknown\n" in text or "\n# TYPE llamacpp:n_tokens_max untyped\n" in text


async def test_streams_in_each_dialect_tell_their_tokens(start, smollm2):
    running = await start({"a": smollm2})
    message = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 6, "stream": True, "ignore_eos": True}
    asked = {
        "/v1/chat/completions": message,
        "/v1/messages": message,
        "/v1/responses": {"input": "Hi", "max_output_tokens": 6, "stream": True, "ignore_eos": True},
        "/completion": {"prompt": "Hi", "n_predict": 6, "stream": True, "ignore_eos": True},
    }
    tokens = running.supervisor.fleet.metrics.of("a").tokens
    for number, (path, body) in enumerate(asked.items(), 1):
        async with running.http.post(running.url + path, json=body) as response:
            assert response.status == 200
            await response.read()
        assert tokens[2] == 6 * number, path
