"""The search: preparation, controller, sampler, planner, profile, study, scheduler and engine."""
