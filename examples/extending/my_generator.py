"""A generator: the policy drafts, is asked again, and the second answer is scored. Both turns are trained on."""

from skyrl_train.data.chat import render_prompt, response_text
from skyrl_train.types import GenerateRequest, Trajectory, Turn


class AskTwice:
    """Takes those arguments of rollout.agent.Agent that it names. What it raises fails one trajectory."""

    def __init__(self, *, generate, tokenizer, environments):
        self.generate, self.tokenizer, self.environments = generate, tokenizer, environments

    def render(self, prompt):
        return render_prompt(self.tokenizer, prompt.messages)

    async def run(self, trajectory_id, prompt, prompt_token_ids, sampling):
        turns, token_ids = [], prompt_token_ids
        for number in range(2):
            if number:  # the tokens so far stay as they are; only the new message is encoded
                token_ids += render_prompt(self.tokenizer, [{"role": "user", "content": "Sure?"}])
            request = GenerateRequest(
                request_id=f"{trajectory_id}/{number}", prompt_token_ids=token_ids, sampling=sampling
            )
            turns.append(Turn(prompt_token_ids=token_ids, completion=await self.generate(request)))
            token_ids += turns[-1].completion.token_ids
        environment = self.environments[prompt.environment](env_config=None, extras=dict(prompt.extras))
        reward = environment.step(response_text(self.tokenizer, turns[-1].completion.token_ids))["reward"]
        return Trajectory(id=trajectory_id, turns=tuple(turns), rewards=(0.0, reward), status="completed")
