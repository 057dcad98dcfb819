-- SPDX-License-Identifier: Apache-2.0
-- Whose record was the last one read, per stream of a journal. Lives of one Envoy follow each other
-- within a stream; between two streams nothing follows.
create table journal_life (
    journal text not null,
    stream  text not null,
    epoch   text not null,
    primary key (journal, stream)
);

-- Lives of Envoy that are over: their open exchanges are closed.
create table ended_life (
    journal  text not null,
    epoch    text not null,
    ended_at timestamptz not null,
    primary key (journal, epoch)
);
