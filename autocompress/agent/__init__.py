"""The search: controller, sampler, planner, profile, study, scheduler and engine."""
