# SPDX-License-Identifier: Apache-2.0
"""Routes of projects."""

from __future__ import annotations

from typing import Any, Literal

import structlog
from fastapi import FastAPI
from pydantic import Field

from control import projects
from control.api.access import CurrentAct, needs
from control.api.bodies import After, Body, Limit, page
from control.api.services import Services
from control.core.roles import Permission
from control.store import PAGE_ROWS_MAX

log = structlog.get_logger()


class NewProject(Body):
    """A project to make."""

    name: str
    labels: dict[str, str] = Field(default_factory=dict)


class ProjectChange(Body):
    """What may change about a project; labels are replaced as a whole."""

    state: Literal["active", "suspended"] | None = None
    labels: dict[str, str] | None = None


def add(app: FastAPI, services: Services) -> None:
    """Add the routes to *app*."""
    store = services.store

    @app.post("/v1/tenants/{tenant}/projects", status_code=201, **needs(Permission.PROJECTS_WRITE))
    def create_project(tenant: str, body: NewProject, act: CurrentAct) -> dict[str, Any]:
        made = projects.create(store, act, tenant, name=body.name, labels=body.labels)
        log.info("project_created", tenant=made["tenant_id"], project=made["project_id"])
        return made

    @app.get("/v1/tenants/{tenant}/projects", **needs(Permission.PROJECTS_READ))
    def list_projects(
        tenant: str, act: CurrentAct, after: After = None, limit: Limit = PAGE_ROWS_MAX
    ) -> dict[str, Any]:
        rows = projects.list_page(store, act, tenant, after=after, limit=limit)
        return page(rows, "projects", key="project_id", limit=limit)

    @app.get("/v1/tenants/{tenant}/projects/{project}", **needs(Permission.PROJECTS_READ))
    def get_project(tenant: str, project: str, act: CurrentAct) -> dict[str, Any]:
        return projects.find(store, act, tenant, project)

    @app.patch("/v1/tenants/{tenant}/projects/{project}", **needs(Permission.PROJECTS_WRITE))
    def change_project(tenant: str, project: str, body: ProjectChange, act: CurrentAct) -> dict[str, Any]:
        changed = projects.change(store, act, tenant, project, state=body.state, labels=body.labels)
        log.info("project_changed", tenant=changed["tenant_id"], project=changed["project_id"], state=changed["state"])
        return changed
